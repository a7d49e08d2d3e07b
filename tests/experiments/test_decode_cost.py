import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from lminf.attention import cache
from lminf.attention.policy import LMInfinite
from lminf.experiments import _streams, decode_cost
from lminf.run import request

COLUMNS = {
    "model", "trained_length", "policy", "position", "ms_per_token", "low", "high", "tokens_per_s",
    "read_ms_per_token", "cache_bytes", "planned_bytes", "steps", "chunk",
}  # fmt: skip


@pytest.mark.slow
def test_a_row_is_one_policy_and_position(rows_of):
    rows = rows_of(
        "decode_cost", positions=(100, 100_000), unbounded_to=100, steps=2, chunk=16,
        policies=("full", "streaming:window=12,sinks=4"),
    )  # fmt: skip
    assert all(set(row) == COLUMNS for row in rows)
    assert [row["position"] for row in rows] == [100, 100, 100_000]
    for row in rows:
        assert 0 < row["low"] <= row["ms_per_token"] <= row["high"]
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_token"])
        assert row["cache_bytes"] == row["planned_bytes"]
    slot_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, channels, float32
    assert [row["cache_bytes"] // slot_bytes for row in rows] == [512, 16, 16]
    figures = decode_cost.plot(rows)
    assert set(figures) == {"decode_cost", "cache_bytes"}
    assert all(isinstance(figure, Figure) for figure in figures.values())
    full, streaming = decode_cost.table(rows)[:2]
    assert full.keys() == {"policy", "100", "100000", "exponent", "visits"}
    assert full["exponent"] is None
    assert abs(streaming["exponent"]) < 0.2  # of a thousand times as many tokens
    assert (full["visits"], streaming["visits"]) == ("n", "window + sinks")


def test_an_exponent_is_that_of_the_two_farthest():
    rows = [{"policy": "full", "position": n, "ms_per_token": t} for n, t in
            ((16_384, 160), (1024, 50), (4096, 80))]  # fmt: skip
    assert decode_cost.exponent(rows, "full", "ms_per_token") == pytest.approx(0.5)


@pytest.mark.parametrize("variant", ["", "choosing"])
def test_every_policy_that_is_timed_has_its_complexity(variant):
    for text in request.parse("decode_cost", [f"--config=:{variant}"]).config.policies:
        assert text.partition(":")[0] in decode_cost.VISITED


def test_a_cache_made_as_if_read_says_what_reading_would_leave():
    shape = cache.CacheShape(1, 100, 1, 1, 1, jnp.float32)
    empty = cache.create(LMInfinite(5, 2), shape, layers=1)
    for tokens, slots in ((4, [0, 1, 2, 3, -1, -1, -1]), (100, [0, 1, 97, 98, 99, 95, 96])):
        assert _streams.as_if_read(empty, LMInfinite(5, 2), tokens).pos.tolist() == [slots]
