import re

import pytest
from matplotlib.figure import Figure

from lminf.attention.policy import Full, LMInfinite
from lminf.errors import InputError
from lminf.evals.needle import ANSWER_TOKENS, Needle
from lminf.experiments import passkey
from lminf.experiments._evals import INSIDE, OUTSIDE
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix

WINDOWED = "lm_infinite:window=400,sinks=4"
COLUMNS = {
    "model", "policy", "task", "generator", "depth", "length", "unit", "prompts_digest",
    "instances", "score", "low", "high", "trained_length", "key_in_window", "attended",
    "cache_bytes", "seconds",
}  # fmt: skip


ASKED = {"lengths": (400, 700), "prompts": (2, 3), "depths": (0.0, 0.5),
         "policies": ("full", WINDOWED)}  # fmt: skip


@pytest.fixture
def rows(rows_of, monkeypatch):
    monkeypatch.setattr(SharedPrefix, "generate", read_by_eye)
    return rows_of("passkey", **ASKED)


@pytest.fixture(autouse=True)
def trained_longer(random_lm, monkeypatch):
    monkeypatch.setattr(LM, "context_length", 400)


def read_by_eye(self, prompts, *, max_new_tokens, stop, on_answer):
    """The key as the policy shows it: in the whole prompt, or in its last `window` bytes."""
    assert max_new_tokens == ANSWER_TOKENS
    for index, prompt in enumerate(prompts):
        match = re.search(r"pass key is (\d+)", prompt[-(self.lm.policy.window or len(prompt)) :])
        on_answer(index, f" {match[1]}. 1" if match else " green. 12345")


def test_a_row_is_one_policy_length_and_depth(rows):
    assert all(set(row) == COLUMNS for row in rows)
    assert len({(row["policy"], row["length"], row["depth"]) for row in rows}) == len(rows) == 8
    assert [row["instances"] for row in rows] == [2] * 4 + [3] * 4
    # All policies are asked the same questions.
    assert [row["prompts_digest"] for row in rows if row["policy"] == "full"] == [
        row["prompts_digest"] for row in rows if row["policy"] == WINDOWED
    ]


def test_a_stopped_run_goes_on_with_the_cells_that_it_lacks(rows, rows_of):
    again = rows_of("passkey", rows[:5], **ASKED)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows[5:]]
    assert rows_of("passkey", rows, **ASKED) == []


def test_a_key_is_found_where_it_is_seen(rows):
    for row in rows:
        assert row["low"] <= row["score"] == row["key_in_window"] <= row["high"]
    assert [row["key_in_window"] for row in rows] == [True] * 6 + [False, True]


def test_the_figure_and_table_tell_keys_inside_a_window_from_those_outside(rows):
    shown = [(line["policy"], line["key"], line.get("400")) for line in passkey.table(rows)]
    assert shown == [
        ("full", INSIDE, "4/4 = 1.00 (0.51–1.00)"),
        (WINDOWED, INSIDE, "4/4 = 1.00 (0.51–1.00)"),
        (WINDOWED, OUTSIDE, None),
    ]
    assert isinstance(passkey.plot(rows), Figure)


def test_a_key_must_stay_in_the_window_until_the_answer_is_given():
    policy = LMInfinite(window=100, sinks=4)
    for start, inside in ((199 + ANSWER_TOKENS, False), (200 + ANSWER_TOKENS, True)):
        needle = Needle("", answer=1, depth=0.5, tokens=300, start=start)
        assert needle.in_window(policy.window) == inside
        assert needle.in_window(Full().window)


@pytest.mark.slow
def test_prompts_of_a_real_model_are_read_in_batches(rows_of):
    (row,) = rows_of("passkey", lengths=(300,), prompts=(2,), depths=(0.5,), policies=("full",))
    assert row["instances"] == 2
    assert row["score"] == 0  # it has learned nothing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": (1,)}, "give one number per length"),
        ({"generator": "landmarks"}, "no generator 'landmarks'; did you mean 'landmark'"),
        ({"policies": ("lm_infinite:window=401,sinks=4",)}, "use window<=400"),
        ({"lengths": (100, 200)}, "no room"),
    ],
)
def test_bad_input_is_said_before_anything_is_read(rows_of, monkeypatch, fields, message):
    monkeypatch.delattr(SharedPrefix, "generate")
    with pytest.raises(InputError, match=message):
        rows_of("passkey", **fields)
