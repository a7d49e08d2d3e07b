"""Questions about long texts, drafted from what is retrieved of them: by rule of acceptance.

Each text has several needles, all of them asked for. Answers are drawn: those of the model alone,
of the draft alone, which reads the retrieved chunks, and of the model with the draft.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lminf.config import parse_choice
from lminf.evals import score
from lminf.evals.suites.ruler import MultiKey
from lminf.evals.suites.suite_task import Instance
from lminf.lm import generate, speculative
from lminf.lm.acceptance import RULES
from lminf.lm.budget import Budget
from lminf.lm.drafts import RetrievedDraft
from lminf.lm.generate import Sampling
from lminf.lm.lm import LM
from lminf.lm.retrieval import Retrieval
from lminf.lm.speculative import Round, Speculation
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

PART = "answers"
MODEL, DRAFT = "the model alone", "the draft alone"


class Way(NamedTuple):
    """Who answers: a draft, or nobody else, and the rule by which its tokens are accepted."""

    draft: str
    acceptance: str = ""


class Answer(NamedTuple):
    """What was written, and what it took of the model that is asked."""

    text: str
    calls: int  # after the prompt
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class DraftedAnswers:
    """The part of the experiment that asks; `c` is its section of the config with the name of the
    model, the seed and the number of tokens that are proposed at a time.
    """

    c: ConfigDict
    lm: LM

    def rows(self, out: RunFolder) -> Iterator[Row]:
        """A row for each text and way to answer that the folder lacks."""
        c, lm = self.c, self.lm
        done = {(Way(row["draft"], row["acceptance"]), row["document"]) for row in out.rows()
                if row.get("part") == PART}  # fmt: skip
        budget = Budget(c.length, lambda text: lm.encode(text)[0], f"tokens of {c.model}")
        task = MultiKey(keys=c.needles, questions=c.needles)
        count = c.documents * c.needles
        instances = task.instances(budget, count=count, key=(c.seed, c.length))
        ways = [Way(MODEL), Way(DRAFT), *(Way(c.draft, rule) for rule in c.rules)]
        cells = [(number, way) for number in range(c.documents) for way in ways]
        with Progress(len(cells), label="questions", unit="texts") as progress:
            for index, (number, way) in enumerate(cells):
                if (way, number) not in done:
                    asked = instances[number * c.needles : (number + 1) * c.needles]
                    yield {
                        "part": PART, "model": c.model, **way._asdict(), "length": c.length,
                        "document": number, "task": task.name, "temperature": c.temperature,
                        "new_tokens": c.new_tokens, "draft_tokens": c.draft_tokens,
                        "questions": c.needles, **self.measured(task, asked, way, number),
                    }  # fmt: skip
                progress.update(index + 1)

    def measured(self, task: MultiKey, asked: Sequence[Instance], way: Way, number: int) -> Row:
        """How many of the questions of a text are answered rightly, and the sums of the counts."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.c.seed), number), len(asked))
        answers = [self.answer(way, self.lm.encode(each.prompt)[0], key)
                   for each, key in zip(asked, keys, strict=True)]  # fmt: skip
        scores = [task.score(task.parse(answer.text), each)
                  for answer, each in zip(answers, asked, strict=True)]  # fmt: skip
        sums = {name: sum(getattr(each, name) for each in answers)
                for name in ("calls", "drafted", "accepted")}  # fmt: skip
        return {"right": int(sum(scores)), **sums}

    def answer(self, way: Way, prompt: Int[np.ndarray, " P"], key: jax.Array) -> Answer:
        """What is drawn after a prompt."""
        c, lm, decode = self.c, self.lm, self.lm.tokenizer.decode
        options = {"sampling": Sampling(c.temperature), "max_new_tokens": c.new_tokens, "key": key}
        if not way.acceptance:
            if way.draft == DRAFT:
                prompt = self.draft.retrieval.of(lm.tokenizer, prompt)
            stream = generate.generate_tokens(lm, [prompt], **options)
            return Answer(decode([int(token[0]) for token in stream]), c.new_tokens - 1)
        rule = parse_choice(way.acceptance, RULES, what="rule of acceptance")
        speculation = Speculation(self.draft, c.draft_tokens, rule)
        rounds: list[Round] = list(speculative.rounds(lm, [prompt], speculation, **options))
        return Answer(
            decode(np.concatenate([each.tokens[0] for each in rounds])),
            calls=sum(each.target_calls for each in rounds[1:]),
            drafted=sum(each.drafted for each in rounds),
            accepted=sum(each.accepted for each in rounds),
        )

    @cached_property
    def draft(self) -> RetrievedDraft:
        retrieval = parse_choice(self.c.draft, {"retrieved": Retrieval}, what="draft")
        return RetrievedDraft(self.lm, retrieval)


def groups(rows: Sequence[Row]) -> dict[Way, list[Row]]:
    """The rows of each way to answer."""
    found: dict[Way, list[Row]] = {}
    for row in rows:
        found.setdefault(Way(row["draft"], row["acceptance"]), []).append(row)
    return found


def answered(rows: Sequence[Row]) -> score.Interval:
    """The share of right answers; questions about one text are no independent samples."""
    scores = [float(index < row["right"]) for row in rows for index in range(row["questions"])]
    return score.of_groups(scores, rows[0]["questions"])


def tokens_per_call(row: Row) -> float:
    """The first token of an answer comes of reading the prompt."""
    return row["questions"] * (row["new_tokens"] - 1) / row["calls"]
