import re

import pytest
from matplotlib.figure import Figure

from lminf.attention.policy import Full, LMInfinite
from lminf.errors import InputError
from lminf.evals.passkey import ANSWER_TOKENS, Sample
from lminf.experiments import passkey
from lminf.lm import prefix
from lminf.lm.lm import LM

WINDOWED = "lm_infinite:window=400,sinks=4"
COLUMNS = {
    "model", "trained_length", "generator", "prompts_digest", "policy", "length", "depth",
    "key_in_window", "prompts", "correct", "accuracy", "low", "high", "seconds",
}  # fmt: skip


ASKED = {"lengths": (400, 700), "prompts": (2, 3), "depths": (0.0, 0.5),
         "policies": ("full", WINDOWED)}  # fmt: skip


@pytest.fixture
def rows(rows_of, monkeypatch):
    monkeypatch.setattr(prefix, "generate", read_by_eye)
    return rows_of("passkey", **ASKED)


@pytest.fixture(autouse=True)
def trained_longer(random_lm, monkeypatch):
    monkeypatch.setattr(LM, "context_length", 400)


def read_by_eye(lm, prompts, *, max_new_tokens, rows, progress):
    """The key as the policy shows it: in the whole prompt, or in its last `window` bytes."""
    assert max_new_tokens == ANSWER_TOKENS
    progress(sum(map(len, prompts)))
    seen = [prompt[-(lm.policy.window or len(prompt)) :] for prompt in prompts]
    found = [re.search(r"pass key is (\d+)", text) for text in seen]
    return [f" {match[1]}. 1" if match else " green. 12345" for match in found]


def test_a_row_is_one_policy_length_and_depth(rows):
    assert all(set(row) == COLUMNS for row in rows)
    assert len({(row["policy"], row["length"], row["depth"]) for row in rows}) == len(rows) == 8
    assert [row["prompts"] for row in rows] == [2, 2, 3, 3] * 2
    # All policies are asked the same questions.
    assert [row["prompts_digest"] for row in rows[:4]] == [
        row["prompts_digest"] for row in rows[4:]
    ]


def test_a_stopped_run_goes_on_with_the_cells_that_it_lacks(rows, rows_of):
    again = rows_of("passkey", rows[:5], **ASKED)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows[5:]]
    assert rows_of("passkey", rows, **ASKED) == []


def test_a_key_is_found_where_it_is_seen(rows):
    for row in rows:
        assert row["correct"] == row["prompts"] * row["key_in_window"]
        assert row["low"] <= row["accuracy"] == row["correct"] / row["prompts"] <= row["high"]
    assert [row["key_in_window"] for row in rows] == [True] * 6 + [False, True]


def test_the_figure_and_table_tell_keys_inside_a_window_from_those_outside(rows):
    inside, outside = passkey.INSIDE, passkey.OUTSIDE
    shown = [(line["policy"], line["key"], line.get("400")) for line in passkey.table(rows)]
    assert shown == [
        ("full", inside, "4/4 (0.51–1.00)"),
        (WINDOWED, inside, "4/4 (0.51–1.00)"),
        (WINDOWED, outside, None),
    ]
    assert isinstance(passkey.plot(rows), Figure)


def test_a_key_must_stay_in_the_window_until_the_answer_is_given():
    policy = LMInfinite(window=100, sinks=4)
    for key_at, inside in ((199 + ANSWER_TOKENS, False), (200 + ANSWER_TOKENS, True)):
        sample = Sample("", key=1, depth=0.5, tokens=300, key_at=key_at)
        assert passkey.in_window(policy, sample) == inside
        assert passkey.in_window(Full(), sample)


@pytest.mark.slow
def test_prompts_of_a_real_model_are_read_in_batches(rows_of):
    (row,) = rows_of("passkey", lengths=(300,), prompts=(2,), depths=(0.5,), policies=("full",))
    assert row["prompts"] == 2
    assert row["correct"] == 0  # it has learned nothing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": (1,)}, "one number of prompts per length"),
        ({"generator": "landmarks"}, "no generator 'landmarks'; did you mean 'landmark'"),
        ({"policies": ("lm_infinite:window=401,sinks=4",)}, "use window<=400"),
        ({"lengths": (100, 200)}, "no room"),
    ],
)
def test_bad_input_is_said_before_anything_is_read(rows_of, monkeypatch, fields, message):
    monkeypatch.delattr(prefix, "generate")
    with pytest.raises(InputError, match=message):
        rows_of("passkey", **fields)
