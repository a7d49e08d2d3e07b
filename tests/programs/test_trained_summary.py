"""Summaries of a model that was trained to write them: its rows of training, and exact budgets."""

import numpy as np
import pytest

from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.experiments import _lookup_budget, _lookups
from lminf.lm.budget import Budget
from lminf.lm.scripted import Scripted
from lminf.programs.trained_summary import Form, Pair, TrainedSummary, training_rows

TEXT = "bees live in a hive of wax, and rivers run to the sea"
FORM = Form(lambda length: f" [{length}] ", ".")
ENCODE = ByteTokenizer().encode


def test_the_shorter_text_and_its_end_are_what_counts():
    pairs = [Pair("a bee lives", 5, "a bee"), Pair("rivers", 3, "sea")]
    batch = training_rows(pairs, FORM, ENCODE, width=24)
    rows = zip(pairs, batch["tokens"], batch["targets"], batch["weights"], strict=True)
    for (text, length, shorter), tokens, targets, weights in rows:
        row = f"{text} [{length}] {shorter}."
        assert bytes(tokens[: len(row) - 1].tolist()).decode() == row[:-1]
        assert bytes(targets[weights > 0].tolist()).decode() == f"{shorter}."
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
    with pytest.raises(InputError, match="a text and its summary of 5 take 22 tokens, and rows"):
        training_rows(pairs, FORM, ENCODE, width=19)


def test_the_longest_length_that_fits_is_asked_for_and_no_budget_is_exceeded():
    asked = []

    def write(prompt):
        asked.append(prompt.removeprefix(TEXT))
        return "a summary that is longer than it should be. And more"

    method = TrainedSummary(Scripted(write), FORM, (4, 8, 16))
    for size in range(5, len(TEXT)):
        room = size - len("Who?")
        text = method.reduce(TEXT, "Who?", Budget.characters(size))
        length = max((each for each in (4, 8, 16) if each <= room), default=4)
        assert asked[-1] == f" [{length}] "
        assert text == "a summary that is longer than it should be"[:room]
    assert method.reduce(TEXT, "Who?", Budget.characters(len(TEXT) + 4)) == TEXT


def test_the_summaries_of_lookups_are_the_facts_of_the_first_keys():
    rows = _lookup_budget.SummaryRows(length=24, rows=6, seed=0, lengths=(4, 8))
    for text, length, shorter in rows.pairs(3):
        facts = sorted(character for character in text if character < chr(_lookups.KEY))
        assert shorter == "".join(facts[:length])
    assert {length for _, length, _ in rows.pairs(3)} == {4, 8}
    assert rows.batch(3)["tokens"].shape == (6, 33)
