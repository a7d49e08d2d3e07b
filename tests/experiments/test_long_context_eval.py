"""Cells, resuming, and what the table says of them; the model's answers are made up."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lminf.errors import InputError
from lminf.experiments import _models, long_context_eval
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.programs import segment_reading
from lminf.run import folder, request

FORGETS, LOOKS_UP = "lm_infinite:window=400,sinks=4", "infllm:window=64,sinks=4,topk=4,block=8"


@pytest.fixture
def measure(random_lm, monkeypatch, tmp_path):
    """`measure(before, field=value, …)`: rows that a run adds to those from before."""
    monkeypatch.setattr(_models, "load", lambda *_, **__: random_lm)
    monkeypatch.setattr(LM, "context_length", 400)
    monkeypatch.setattr(SharedPrefix, "generate", read_by_eye)

    def run(before=(), **fields):
        config = request.parse("long_context_eval", ["--config=long_context_eval:tiny"]).config
        config.update({**ASKED, **fields})
        out = folder.RunFolder(Path(tempfile.mkdtemp(dir=tmp_path)))
        for row in before:
            out.append_row(row)
        return list(long_context_eval.run(config, out))

    return run


def read_by_eye(self, prompts, *, max_new_tokens, stop, on_answer):
    """What is asked for, where the policy shows it: everywhere, or in its last `window` bytes."""
    policy = self.lm.policy
    for index, prompt in enumerate(prompts):
        text = prompt if policy.name.startswith("infllm") else prompt[-policy.window :]
        on_answer(index, found_by_eye(prompt, text))


def found_by_eye(prompt, text):
    asked = re.search(r"key (\d+)\? The value", prompt)
    wanted = rf"of key {asked[1]} is (\d+)" if asked else r"pass key is (\d+)"
    found = re.search(wanted, text)
    return f" {found[1]}." if found else " green. 12345"


ASKED = {
    "lengths": (600,), "prompts": (2,), "depths": (0.1, 0.9), "key_value_lengths": (500,),
    "key_value_prompts": (2,), "key_value_depths": (0.0,), "policies": (FORGETS, LOOKS_UP),
    "nll_length": 0,
}  # fmt: skip


@pytest.mark.slow
def test_a_cell_is_a_task_a_policy_a_length_and_a_depth(measure):
    every = measure()
    assert len({long_context_eval.cell_of(row) for row in every}) == len(every) == 8
    *rows, _, _ = every
    # Depths of one policy come together; policies are asked the same.
    for one, other in ((rows[0], rows[2]), (rows[1], rows[3]), (rows[4], rows[5])):
        assert one["prompts_digest"] == other["prompts_digest"]
    for row in rows:
        assert row["score"] == (row["key_in_window"] or row["policy"].startswith("infllm"))
        assert row["low"] <= row["score"] <= row["high"]
    kept = {row["policy"]: row["cache_bytes"] for row in rows if row["length"] == 600}
    forgets, looks_up = kept.values()
    assert looks_up > forgets  # which keeps every token, and summaries beside them
    assert [row["task"] for row in every[6:]] == ["speed", "speed"]
    for row in every[6:]:
        assert row["length"] == 600
        assert row["read_tokens_per_second"] > 0 < row["ms_per_token"]
    forgets, looks_up = long_context_eval.table(every)
    assert forgets["ms/token, writing"] == every[6]["ms_per_token"]
    assert forgets["passkey 600 outside"].startswith("0/2 = 0.00 (0.00–0.6")
    assert looks_up["passkey 600 outside"].startswith("4/4 = 1.00 (0.5")
    assert forgets["passkey 600 in window"].startswith("2/2")
    assert (forgets["attended"], looks_up["attended"]) == (404, 64 + 4 + 4 * 8)
    figures = long_context_eval.plot(every)
    assert set(figures) == {"long_context_eval", "key_value"}
    assert all(isinstance(figure, Figure) for figure in figures.values())


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(measure):
    rows = measure()
    again = measure(rows[:4])
    assert [long_context_eval.cell_of(row) for row in again] == [
        long_context_eval.cell_of(row) for row in rows[4:]
    ]


def test_a_policy_is_asked_of_all_depths_at_once_and_only_what_is_missing(measure, monkeypatch):
    sizes = []

    def counted(self, prompts, **options):
        sizes.append(len(prompts))
        read_by_eye(self, prompts, **options)

    monkeypatch.setattr(SharedPrefix, "generate", counted)
    rows = measure()
    assert sizes == [4, 4, 2, 2]
    sizes.clear()
    assert len(measure(rows[:1] + rows[2:])) == 1
    assert sizes == [2]


def test_reading_in_segments_is_one_of_the_policies(measure, monkeypatch):
    read = []

    def generate(lm, prompt, how, *, max_new_tokens, stop):
        read.append((how.segment_len, how.select.count))
        return found_by_eye(prompt, prompt)

    monkeypatch.setattr(segment_reading, "generate", generate)
    text = "segments:segment_len=150,question_len=60,head_len=90,select=(TopK:count=1)"
    rows = measure(policies=(text,))
    assert read == [(150, 1)] * 6
    assert all(row["policy"] == text and row["score"] == 1 for row in rows)
    assert {row["attended"] for row in rows} == {150 + 60 + 90 + 10}
    assert not any(row["key_in_window"] for row in rows)


def test_every_length_has_its_number_of_prompts(measure):
    with pytest.raises(InputError, match=r"passkey: numbers of prompts \(2, 3\) for lengths"):
        measure(prompts=(2, 3))


@pytest.mark.slow
def test_losses_lie_beside_those_of_reading_again(measure):
    rows = measure(prompts=(1,), depths=(0.1,), key_value_prompts=(1,), nll_length=300, block=100)
    losses = [row for row in rows if row["task"] == "nll"]
    assert [(row["policy"], row["length"]) for row in losses][:3] == [
        ("re-read", 100), ("re-read", 200), ("re-read", 300),
    ]  # fmt: skip
    assert len(losses) == 9
    read_again, own = losses[2]["nll"], losses[5]["nll"]
    line = long_context_eval.table(rows)[0]
    assert line["of the last"] == own - read_again
    assert line["of the worst block"] >= line["nll above re-reading past the trained length"]
    assert set(long_context_eval.plot(rows)) == {"long_context_eval", "key_value", "above_reread"}
    assert set(long_context_eval.plot(losses)) == {"above_reread"}


@pytest.mark.slow
def test_a_policy_that_selects_for_the_last_query_alone_has_no_loss(measure, random_lm):
    """Its rows would be vacuous: those of LM-Infinite, which it is for every other query."""
    topk, base = "topk:window=64,sinks=4,topk=5,from_layer=0", "lm_infinite:window=64,sinks=4"
    tokens = np.random.default_rng(0).integers(97, 123, 200)
    selected, forgot = (random_lm.with_policy(each).token_nll(tokens) for each in (topk, base))
    assert (np.abs(selected - forgot) > 1e-5).sum() <= 1
    rows = measure(
        prompts=(1,), depths=(0.1,), key_value_prompts=(1,), nll_length=200, block=100,
        policies=(base, topk, LOOKS_UP),
    )  # fmt: skip
    losses = {}
    for row in rows:
        if row["task"] == "nll":
            losses.setdefault(row["policy"], []).append(row["nll"])
    assert len(losses) == 3  # with re-reading
    assert not any(policy.startswith("topk") for policy in losses)
    assert len({each[-1] for each in losses.values()}) == 3  # none is that of another


def test_no_loss_of_the_configs_is_of_such_a_policy():
    config = request.parse("long_context_eval", ["--config=long_context_eval:loss"]).config
    assert not any(text.startswith("topk") for text in config.policies)
