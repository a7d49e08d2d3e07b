"""The runner on scripted models: independent cells, no answer lost or asked twice, intervals."""

import dataclasses
import re

import pytest

from lminf.errors import InputError
from lminf.evals import runner, score
from lminf.evals.key_value import KeyValue
from lminf.evals.passkey import Passkey
from lminf.evals.runner import Cell, Subject
from lminf.evals.suites.needle_threading import SingleNeedle
from lminf.evals.task import Budget
from lminf.lm.scripted import Scripted
from tests.evals.suite_solvers import looked_up

CELLS = [
    Cell(Passkey(depth=0.1), 800, 4),
    Cell(Passkey(depth=0.9), 800, 4),
    Cell(KeyValue(depth=0.5), 800, 4),
]


def oracle(prompt: str) -> str:
    """The right answer to either task, found by reading the prompt."""
    if asked := re.search(r"What is the value of key (\d+)", prompt):
        found = re.search(rf"The value of key {asked[1]} is (\d+)\.", prompt)
    else:
        found = re.search(r"The pass key is (\d+)\.", prompt)
    assert found
    return f" {found[1]}."


@dataclasses.dataclass
class Counting:
    """A scripted model that keeps the prompts it was asked; it stops after `limit` of them."""

    answer: object = oracle
    limit: int | None = None
    asked: list[str] = dataclasses.field(default_factory=list)

    def generate(self, prompts, *, max_new_tokens, stop=(), on_answer):
        for index, prompt in enumerate(prompts):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            (text,) = Scripted(self.answer).generate([prompt], max_new_tokens=max_new_tokens)
            on_answer(index, text)


def measure(models, **options):
    asked = {"cells": CELLS, "budget": Budget.characters, "seed": 0} | options
    subjects = [Subject(model, {"model": name}) for name, model in models.items()]
    return list(runner.measure(subjects, **asked))


def test_an_oracle_scores_one_and_a_wrong_model_zero():
    rows = measure({"oracle": Scripted(oracle), "wrong": Scripted(lambda prompt: " 1.")})
    assert len(rows) == 2 * len(CELLS)
    for row in rows:
        assert row["score"] == (row["model"] == "oracle")
        assert row["instances"] == 4
        assert row["unit"] == "characters"
        assert (row["score"], row["low"], row["high"]) == score.success_rate(
            4 * (row["model"] == "oracle"), 4
        )
    assert rows[0]["task"] == "passkey"
    assert rows[0]["depth"] == 0.1


def test_a_model_that_ends_its_answers_itself_may_write_several_lines():
    cells = [Cell(SingleNeedle(), 2000, 2)]  # it ends a text at the first line
    for ends in (False, True):
        model = Scripted(lambda prompt: f"Well:\n{looked_up(prompt)}")
        subject = Subject(model, {}, ends_answers=ends)
        (row,) = runner.measure([subject], cells, budget=Budget.characters, seed=0)
        assert row["score"] == ends


def test_cells_are_independent_samples():
    model = Counting()
    measure({"m": model})
    keys = [re.findall(r"\d{5}", oracle(prompt))[0] for prompt in model.asked]
    assert len(set(keys)) == len(keys) == 12  # none is asked in two cells


def test_models_are_asked_the_same_questions():
    one, two = Counting(), Counting()
    measure({"one": one, "two": two})
    assert one.asked == two.asked


@pytest.mark.parametrize("task", [Passkey(depth=0.5), Passkey(), KeyValue(depth=0.5)])
def test_a_longer_cell_begins_with_the_same_instances(task):
    few, more = Counting(), Counting()
    measure({"m": few}, cells=[Cell(task, 800, 3)])
    measure({"m": more}, cells=[Cell(task, 800, 6)])
    assert more.asked[:3] == few.asked


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 11])
def test_a_stopped_run_asks_only_what_is_missing(limit):
    uninterrupted = Counting()
    expected = measure({"m": uninterrupted})
    rows, answers, stopped, resumed = [], [], Counting(limit=limit), Counting()
    options = {"cells": CELLS, "budget": Budget.characters, "seed": 0,
               "record": answers.append}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):  # what came before it stays
        rows.extend(runner.measure([Subject(stopped, {"model": "m"})], **options))
    rest = measure({"m": resumed}, rows=rows, answers=list(answers), record=answers.append)
    assert stopped.asked + resumed.asked == uninterrupted.asked
    assert len({answer["prompt_digest"] for answer in answers}) == len(answers) == 12
    assert [without_time(row) for row in rows + rest] == [without_time(row) for row in expected]


def test_an_answer_that_lacks_a_column_is_asked_for_again():
    first, again, answers = Counting(), Counting(), []
    options = {"cells": CELLS, "budget": Budget.characters, "seed": 0}
    rows = list(runner.measure([Subject(first, {"model": "m"})], record=answers.append, **options))
    damaged = [{k: v for k, v in answer.items() if k != "score" or n} for n, answer in
               enumerate(answers)]  # fmt: skip
    found = list(runner.measure([Subject(again, {"model": "m"})], answers=damaged, **options))
    assert len(again.asked) == 1
    assert [without_time(row) for row in found] == [without_time(row) for row in rows]


def without_time(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_answers_of_other_prompts_are_not_taken_for_these():
    answers = []
    measure({"m": Scripted(oracle)}, record=answers.append)
    model = Counting()
    measure({"m": model}, seed=1, answers=answers)
    assert len(model.asked) == 12


def test_progress_counts_the_budgets_of_the_prompts_that_are_asked():
    told, answers = [], []
    measure({"m": Counting()}, record=answers.append)
    measure({"m": Counting()}, answers=answers[:3], progress=lambda *counts: told.append(counts))
    assert told == [(count * 800, 9 * 800) for count in range(1, 10)]


def test_cells_of_one_task_and_length_are_asked_in_one_call():
    calls = []

    class Model(Counting):
        def generate(self, prompts, **options):
            calls.append(len(prompts))
            super().generate(prompts, **options)

    measure({"m": Model()})
    assert calls == [8, 4]


@pytest.mark.parametrize("make", [KeyValue, lambda depth: Passkey(depth=depth)])
def test_depths_ask_for_keys_of_their_own(make):
    """Pseudo-replication: the same keys at ten depths would be one sample that counts as ten."""
    model = Counting()
    measure({"m": model}, cells=[Cell(make(depth), 800, 2) for depth in (0.0, 0.5, 0.9)])
    found = [re.findall(r"\d{5}", oracle(prompt))[0] for prompt in model.asked]
    assert len(set(found)) == len(found) == 6


@dataclasses.dataclass(frozen=True)
class Chosen(KeyValue):
    """Key-value retrieval where the answer is one of the values of the list."""

    def choices(self, instance):
        return [f" {value}" for value in re.findall(r"is (\d+)\.", instance.prompt)]


def test_of_choices_the_likeliest_is_the_answer():
    cells = [Cell(Chosen(0.5), 400, 3)]
    right, wrong = measure(
        {"right": Scripted(oracle), "wrong": Scripted(lambda prompt: " 12345")}, cells=cells
    )
    assert right["score"] == 1
    assert wrong["score"] < 1
    with pytest.raises(InputError, match=r"key_value compares the probabilities .* 'm'"):
        measure({"m": Counting()}, cells=cells)


def test_answers_are_recorded_every_few_questions():
    """Prompts that all begin alike are no reason to lose the answers of a whole cell."""

    class Batches(Scripted):
        def score(self, prompts, continuations):
            calls.append(len(set(prompts)))
            return super().score(prompts, continuations)

    @dataclasses.dataclass(frozen=True)
    class Alike(Chosen):
        def prompt(self, instance):
            return "x" * 500 + super().prompt(instance)

    calls = []
    measure({"m": Batches(lambda prompt: oracle(prompt[500:]))}, cells=[Cell(Alike(0.5), 400, 20)])
    assert calls == [8, 8, 4]
    calls.clear()
    measure({"m": Batches(oracle)}, cells=[Cell(Chosen(0.5), 400, 3)])
    assert calls == [1, 1, 1]


def test_rows_have_the_facts_of_their_subject():
    def facts(length, needles):
        return {"most": max(needle.tokens for needle in needles) / length}

    subject = Subject(Counting(), {"model": "m", "policy": "full"}, facts)
    (row,) = runner.measure([subject], CELLS[:1], budget=Budget.characters, seed=0)
    assert (row["model"], row["policy"]) == ("m", "full")
    assert 0.9 < row["most"] <= 1
    assert list(row)[-1] == "seconds"


def test_a_budget_without_room_is_refused():
    with pytest.raises(InputError, match="a budget of 0 characters holds no prompt"):
        Budget.characters(0)
    with pytest.raises(InputError, match=r"length=40 .* has no room"):
        measure({"m": Scripted(oracle)}, cells=[Cell(Passkey(depth=0.5), 40, 1)])


def test_a_mean_has_a_bootstrap_interval():
    interval = score.mean_score([0.0, 0.5, 1.0, 0.5] * 10)
    assert interval.mean == 0.5
    assert 0.3 < interval.low < 0.5 < interval.high < 0.7
    assert score.mean_score([0.25]) == (0.25, 0.0, 1.0)
    with pytest.raises(ValueError, match="no scores"):
        score.mean_score([])
