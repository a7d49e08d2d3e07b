"""The benchmark of a device: what it keeps when parts fail or the time ends, and its toy form."""

import json

import jax
import numpy as np
import pytest

from benchmarks import device


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
