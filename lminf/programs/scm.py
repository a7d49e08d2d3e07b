"""SCM, a self-controlled memory: which earlier turns of a conversation a prompt holds, and in what
form.

    recall    the turns most alike the question, later ones preferred among equals
    decide    for each: drop it, keep its summary or its text, by whether they answer the question
    order     as they were said, and the previous turn at the end

The controller's questions are answered by the model: the likelier of yes and no, so that every
answer is one of the two. Source: Wang et al. 2023, arXiv:2304.13343; the sentences of the prompts
are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float

from lminf import ranges
from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.protocol import LanguageModel
from lminf.programs.reduce import Count, TextReducer, chunks, longest_fitting
from lminf.programs.reduce_by_model import check_embeds, unit_vectors
from lminf.ranges import Range

SUMMARIZE = "{text}\n\nSay in one sentence what the text above says.\nSummary:"
NEEDED = (
    "Question: {question}\n\nDoes answering this question need what was said earlier in the "
    "conversation? Answer yes or no.\nAnswer:"
)
ANSWERS = (
    "{text}\n\nQuestion: {question}\n\nCan the question be answered from the text above? Answer "
    "yes or no.\nAnswer:"
)
YES, NO = " yes", " no"
BLANK_LINE = "\n\n"


class Turn(NamedTuple):
    """One turn of a conversation, its one-sentence summary (itself where it is short), and its
    embedding.
    """

    text: str
    summary: str
    embedding: Float[np.ndarray, " D"]  # of the text, of length 1


@dataclass(frozen=True)
class SCM(TextReducer):
    """A stream of turns and its controller. As a reducer, it takes a context's parts between blank
    lines for turns, or every `turn_words` words.
    """

    model: LanguageModel
    recalled: Annotated[int, Range(min=0, max=2**31 - 1)] = 6  # turns beside the previous one
    verbatim: Count = 500  # tokens up to which the previous turn is not replaced by its summary
    summarize_from: Count = 300  # tokens from which on a turn has a summary
    summary_tokens: Count = 100  # at most, of a summary
    # Added to the cosine of the last turn; in proportion to its number to that of others.
    recency: Annotated[float, Range(min=0)] = 0.0
    turn_words: Count | None = None
    ask_first: bool = True  # whether memory is needed at all

    name = "scm"

    def __post_init__(self):
        ranges.check(self)
        check_embeds(self.model, self.name)

    def remember(self, memory: Sequence[Turn], text: str) -> tuple[Turn, ...]:
        """The memory with one more turn at its end."""
        return *memory, *self._turns([text])

    def _turns(self, texts: Sequence[str]) -> list[Turn]:
        vectors = unit_vectors(self.model, texts)
        return [Turn(text, self._summary(text), vector)
                for text, vector in zip(texts, vectors, strict=True)]  # fmt: skip

    def _summary(self, text: str) -> str:
        if self.model.count_tokens(text) < self.summarize_from:
            return text
        (reply,) = self.model.generate(
            [SUMMARIZE.format(text=text)], max_new_tokens=self.summary_tokens
        )
        return reply.strip() or text

    def shorten(self, context: str, question: str, budget: Budget) -> str:
        texts = chunks(context, self.turn_words) if self.turn_words else [
            part for part in context.split(BLANK_LINE) if part.strip()
        ]  # fmt: skip
        return self.recall(self._turns(texts), question, budget)

    def recall(self, memory: Sequence[Turn], question: str, budget: Budget) -> str:
        """The turns that a prompt with this question holds, each followed by a blank line: the
        budget is of them and the question. At most 2 `recalled` + 1 questions are asked.
        """
        if not memory:
            raise InputError("the memory has no turns; remember one first")
        *earlier, last = memory
        previous, forms = self._previous(last, question, budget), {}

        def text() -> str:
            return "".join(forms[index] + BLANK_LINE for index in sorted(forms)) + previous

        def fits() -> bool:
            return budget.holds(text() + question)

        ranking = self._ranking(earlier, question)  # the least alike first
        if ranking and self.ask_first and not self._yes(NEEDED.format(question=question)):
            return text()
        forms.update({index: earlier[index].text for index in ranking})
        for index in ranking[:-1]:  # the most alike is not asked about
            if fits():
                return text()
            if not self._answers(earlier[index].text, question):
                del forms[index]
            elif earlier[index].summary != earlier[index].text and self._answers(
                earlier[index].summary, question
            ):
                forms[index] = earlier[index].summary
        for index in [index for index in ranking if index in forms]:
            if not fits():
                forms[index] = earlier[index].summary
        # Where all are summaries and still too long, the published loop does not end.
        for index in [index for index in ranking if index in forms]:
            if not fits():
                del forms[index]
        return text()

    def _previous(self, turn: Turn, question: str, budget: Budget) -> str:
        """The last turn: verbatim, or its summary; the end of that, if it does not fit either."""
        brief = self.model.count_tokens(turn.text) <= self.verbatim
        for form in [turn.text, turn.summary] if brief else [turn.summary]:
            if budget.holds(form + BLANK_LINE + question):
                return form + BLANK_LINE
        end = turn.summary + BLANK_LINE
        return longest_fitting(lambda count: end[len(end) - count :], len(end), question, budget)

    def _ranking(self, earlier: Sequence[Turn], question: str) -> list[int]:
        """The turns that are recalled, the least alike the question first."""
        if not (count := min(self.recalled, len(earlier))):
            return []
        (query,) = unit_vectors(self.model, [question])
        alike = np.stack([turn.embedding for turn in earlier]) @ query
        alike += self.recency * np.arange(1, len(earlier) + 1) / len(earlier)
        return np.argsort(alike, kind="stable")[-count:].tolist()

    def _answers(self, text: str, question: str) -> bool:
        return self._yes(ANSWERS.format(text=text, question=question.strip()))

    def _yes(self, prompt: str) -> bool:
        yes, no = self.model.score([prompt] * 2, [YES, NO])
        return yes.log_prob > no.log_prob
