"""SCM on a scripted model: what enters the prompt, in what form and order, within every budget."""

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.scripted import Scripted
from lminf.programs.scm import SCM, Turn

TURNS = [
    "The red box holds zebras, zinc and zeros. " * 2,
    "It rained all of Monday. " * 3,
    "The blue box holds quartz, quails and quizzes. " * 2,
    "We ate soup on Tuesday. " * 3,
    "The green box holds jam, jazz and jets. " * 2,
    "Then we went home.",
]
QUESTION = "What does the blue box with quartz, quails and quizzes hold?"


class Controller:
    """A scripted model that keeps what it is asked."""

    def __init__(self, needed="yes", answering=("blue",)):
        self.asked, self.needed, self.answering = [], needed, answering
        self.model = Scripted(self.answer)

    def __getattr__(self, verb):
        return getattr(self.model, verb)

    def score(self, prompts, continuations):
        self.asked.append(prompts[0])
        return self.model.score(prompts, continuations)

    def answer(self, prompt):
        if prompt.startswith("Question"):
            return f" {self.needed}"
        if prompt.endswith("Summary:"):
            return f" In short: {prompt[:13]}"
        text = prompt[: prompt.index("\n\nQuestion")]
        return " yes" if any(word in text for word in self.answering) else " no"


def memory_of(scm, turns=TURNS):
    memory = ()
    for turn in turns:
        memory = scm.remember(memory, turn)
    return memory


def recalled(text):
    return [turn for turn in text.split("\n\n") if turn]


def alike(scm, memory, question=QUESTION):
    """The earlier turns by their cosine with the question, the most alike first."""
    vector = scm.model.embed([question])[0]
    cosines = [turn.embedding @ vector for turn in memory[:-1]]
    return [memory[i].text for i in np.argsort(cosines)[::-1]]


def test_an_endless_budget_has_the_turns_most_alike_as_they_were_said():
    scm = SCM(Controller(), recalled=3)
    memory = memory_of(scm)
    text = scm.recall(memory, QUESTION, Budget.characters(10_000))
    best = alike(scm, memory)[:3]
    assert "blue" in best[0]
    assert recalled(text) == [turn for turn in TURNS[:-1] if turn in best] + [TURNS[-1]]
    assert len(scm.model.asked) == 1  # whether memory is needed


@pytest.mark.parametrize("summarize_from", [20, 300])
def test_every_budget_is_kept_with_at_most_two_questions_a_turn_and_one(summarize_from):
    for size in range(len(QUESTION) + 1, 600, 13):
        controller = Controller(answering=("box",))
        scm = SCM(controller, recalled=4, summarize_from=summarize_from)
        memory = memory_of(scm)
        text = scm.recall(memory, QUESTION, Budget.characters(size))
        assert len(text + QUESTION) <= size
        assert len(controller.asked) <= 2 * 4 + 1
        places = [
            next(i for i, t in enumerate(memory) if turn in (t.text, t.summary))
            for turn in recalled(text)[:-1]
        ]
        assert places == sorted(places)


def test_turns_that_do_not_answer_are_dropped_and_others_summarised_until_it_fits():
    scm = SCM(Controller(answering=("green", "blue", "In short")), recalled=5, summarize_from=20)
    memory = memory_of(scm)
    room = len(TURNS[2]) + len("In short: The green box") + len(TURNS[-1]) + 6 + len(QUESTION)
    kept = recalled(scm.recall(memory, QUESTION, Budget.characters(room)))
    assert TURNS[2] in kept  # the most alike, as it is
    assert kept[-1] == TURNS[-1]
    assert set(kept[:-1]) <= {TURNS[2], "In short: The green box"}


def test_the_previous_turn_is_verbatim_up_to_a_length_and_else_its_summary():
    for verbatim, last in ((1000, TURNS[4]), (10, "In short: The green box")):
        scm = SCM(Controller(), recalled=0, verbatim=verbatim, summarize_from=20)
        memory = memory_of(scm, TURNS[:5])
        assert recalled(scm.recall(memory, QUESTION, Budget.characters(999))) == [last]
        assert recalled(scm.recall(memory[-1:], QUESTION, Budget.characters(999))) == [last]


def test_memory_that_is_not_needed_is_not_read():
    scm = SCM(Controller(needed="no"))
    text = scm.recall(memory_of(scm), QUESTION, Budget.characters(10_000))
    assert recalled(text) == TURNS[-1:]


def test_recency_prefers_later_turns():
    def first(recency):
        scm = SCM(Controller(), recalled=1, recency=recency)
        return recalled(scm.recall(memory_of(scm), QUESTION, Budget.characters(999)))[0]

    assert first(0.0) == TURNS[2]
    assert first(10.0) == TURNS[4]


def test_a_context_is_reduced_by_its_paragraphs_or_so_many_words():
    budget = Budget.characters(230)
    scm = SCM(Controller(), recalled=2)
    kept = scm.reduce("\n\n".join(TURNS), QUESTION, budget)
    assert TURNS[2] in kept
    assert len(kept + QUESTION) <= 230
    scm = SCM(Controller(), recalled=2, turn_words=8)
    kept = scm.reduce(" ".join(TURNS), QUESTION, budget)
    assert "blue" in kept
    assert kept == scm.reduce(" ".join(TURNS), QUESTION, budget)


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(InputError, match="scm compares embeddings, which object does not give"):
        SCM(object())
    with pytest.raises(InputError, match="the memory has no turns; remember one first"):
        SCM(Controller()).recall([], QUESTION, Budget.characters(100))
    with pytest.raises(InputError, match=r"SCM\.verbatim is 0"):
        SCM(Controller(), verbatim=0)
    assert Turn._fields == ("text", "summary", "embedding")
