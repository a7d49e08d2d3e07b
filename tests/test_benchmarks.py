"""What the benchmark of a device keeps when parts fail, its toy form, and goals beside peers."""

import json

import jax
import numpy as np
import pytest

from benchmarks import compare, device


def test_every_part_is_kept_and_one_that_fails_says_so(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(device.time, "monotonic", lambda: float(next(clock)))
    out = tmp_path / "results.json"

    def broken():
        assert json.loads(out.read_text())["parts"]["right"]["result"] == {"number": 1}
        raise RuntimeError("no such instruction")

    def wrong():
        return {"checks": [{"ok": True}, {"ok": False}]}

    measured = [("right", lambda: {"number": 1}), ("broken", broken), ("wrong", wrong),
                ("late", broken)]  # fmt: skip
    results = device.measure(iter(measured), seconds=65, out=out)
    assert results["not_reached"] == ["late"]
    assert results["parts"]["broken"]["result"] == {"failed": "RuntimeError: no such instruction"}
    assert device.failures(results) == ["broken", "wrong"]
    assert list(json.loads(out.read_text())["parts"]) == ["right", "broken", "wrong"]


def test_the_sizes_are_those_of_the_published_numbers():
    size = device.sizes(tiny=False)
    assert size.attention == {"B": 1, "T": 131_072, "w": 4096, "g": 128, "N": 32, "K": 8, "H": 128}
    assert size.loss == {"N": 8192, "D": 2304, "V": 256_000}
    assert 1e9 < device.cost.parameters(size.trained) < 1.2e9


@pytest.mark.slow
def test_a_model_is_timed_in_its_toy_form():
    row = device.model(device.sizes(tiny=True), device.TINY_POLICIES[1])
    assert row["tokens"] == 64
    assert row["tokens_per_second"] > 0
    assert len(row["ms_per_token"]) == 3
    assert row["ms_per_token"] == sorted(row["ms_per_token"])


@pytest.mark.slow
def test_training_is_timed_in_its_toy_form():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        row = device.training(device.sizes(tiny=True), 32, 2)
    assert row["tokens"] == 64
    assert 0 < row["mfu"] < 1
    np.testing.assert_allclose(row["loss"], np.log(257), atol=1)


def run(seconds, memory):
    return {"seconds": seconds, "tokens": 100, "peak_memory_bytes": memory}


def test_a_goal_is_reached_by_the_median_of_runs_that_took_turns():
    runs = {("read", "full"): [run(10, 3), run(20, 3), run(10, 3)],
            ("read", "transformers"): [run(15, 2), run(20, 2), run(16, 2)]}  # fmt: skip
    found = compare.reached(compare.Goal("read", "full", "transformers", least=1.5), runs)
    assert (found["measured"], found["range"], found["reached"]) == (
        1.5,
        pytest.approx([1.0, 1.6]),
        True,
    )
    assert not compare.reached(compare.Goal("read", "full", "transformers", least=1.6), runs)[
        "reached"
    ]
    found = compare.reached(compare.Goal("read", "full", "transformers", memory=1.2), runs)
    assert (found["measured"], found["reached"]) == (1.5, False)


def test_every_goal_names_sides_that_are_measured():
    for goal in compare.GOALS:
        assert goal.ours in compare.OURS
        assert goal.peer in compare.PEERS | compare.OURS
        assert (goal.least is None) != (goal.memory is None)
