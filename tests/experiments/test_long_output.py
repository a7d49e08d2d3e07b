"""Requests with their answers, the table, and what the experiment refuses."""

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import long_output
from lminf.run import request


def test_an_answer_counts_up_to_its_request_and_ends():
    batch = long_output.Answers(12, 50, seed=0, longest=9).batch(0)
    lengths = set()
    for tokens, targets, weights in zip(*batch.values(), strict=True):
        last = tokens[0] - long_output.FIRST + 1
        counted = targets[weights == 1].tolist()
        assert counted == [*range(long_output.FIRST, long_output.FIRST + last), long_output.END]
        assert weights[0] == 0
        lengths.add(int(last))
    assert lengths == set(range(1, 10))


def test_answers_weigh_the_same_whatever_their_length():
    batch = long_output.Answers(12, 50, seed=0, longest=9, per_sequence=True).batch(0)
    plain = long_output.Answers(12, 50, seed=0, longest=9).batch(0)
    assert (batch["tokens"] == plain["tokens"]).all()
    for weights, ones in zip(batch["weights"], plain["weights"], strict=True):
        np.testing.assert_allclose(weights, ones / ones.sum(), rtol=1e-6)


def test_texts_count_on_and_never_end():
    text = long_output.Texts(200, 4, seed=0).batch(0)["tokens"]
    steps = np.diff((text - long_output.FIRST) % long_output.NUMBERS)
    assert set(steps.ravel().tolist()) == {1, 1 - long_output.NUMBERS}
    assert long_output.END not in text


def test_the_table_has_the_longest_output_of_each_seed():
    rows = [
        {"longest_trained": 4, "seed": seed, "requested": requested, "written": written,
         "score": score}
        for seed, extra in ((0, 0), (1, 2))
        for requested, written, score in ((2, 2, 1.0), (8, 4 + extra, 0.5))
    ]  # fmt: skip
    (line,) = long_output.table(rows)
    assert line["loss weights"] == "per_token"  # of rows that do not say
    assert line["longest trained"] == 4
    assert line["longest output"].startswith("5.0 (")
    assert line["score of trained lengths"].startswith("1.00")
    assert line["score of longer ones"].startswith("0.50")
    shorter = [{**row, "weights": "per_sequence", "written": row["written"] - 1} for row in rows]
    *_, above = long_output.table([*rows, *shorter])
    assert above["loss weights"] == "per_sequence above per_token"
    assert above["longest output"].startswith("-1.0 (-1.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requested": (2, 95)}, r"go up to 95, but there are 94 numbers; give none above it"),
        ({"loss_weights": ("token",)}, r"there are no loss weights 'token'; "),
        ({"longest": (4, 7)}, r"an answer of 7 characters .*; give --config.tuning.length>=9"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    config = request.parse("long_output", ["--config=long_output:tiny"]).config
    config.update(changes)
    with pytest.raises(InputError, match=message):
        long_output.check(config)
