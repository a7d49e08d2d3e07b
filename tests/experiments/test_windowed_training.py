"""Training under windows and reading far: readings that must agree do; costs are counted."""

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import windowed_training
from lminf.run import request

HALF, WHOLE = "lm_infinite:window=8,sinks=4", "lm_infinite:window=16,sinks=4"


@pytest.mark.slow
def test_readings_of_the_trained_length_agree_and_costs_are_counted(rows_of):
    """Within the trained length a window of it hides nothing, and neither does re-reading."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("windowed_training")
        position = [row for row in rows if row["part"] == "position"]
        first = {
            (row["trained"], row["read"], row["seed"]): row["loss"]
            for row in position if row["start"] == 0
        }  # fmt: skip
        for seed in (0, 1):
            whole = first["full", "full", seed]
            assert first["full", WHOLE, seed] == pytest.approx(whole, abs=1e-5)
            assert first["full", "re-read", seed] == pytest.approx(whole, abs=1e-5)
            assert abs(first["full", HALF, seed] - whole) > 1e-4
        edges = {(row["start"], row["stop"]) for row in position}
        assert edges == {(0, 16), (16, 32), (32, 64)}
        needs = {row["read"]: (row["attended"], row["cache_bytes"]) for row in position}
        token = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 channels, float32
        assert needs["full"] == (64, 64 * token)
        assert needs[HALF] == (8 + 4, 12 * token)
        assert needs["re-read"] == (16, 16 * token)
    config = request.parse("windowed_training", ["--config=windowed_training:tiny"]).config
    left = [row for row in rows if row != position[-1]]  # by an interrupted call
    every = {(trained, seed) for trained in ("full", HALF) for seed in (0, 1)}
    study = windowed_training.Study(config)
    assert windowed_training.finished(left, study) == every - {(HALF, 1)}
    assert windowed_training.finished(rows, study) == every
    speeds = [row for row in rows if row["part"] == "speed"]
    assert [row["length"] for row in speeds] == [16, 16, 64, 64]
    assert all(row["peak_bytes"] > row["held_bytes"] > 0 for row in speeds)
    lines = windowed_training.table(rows)
    base = {row["seed"]: row["loss"] for row in position
            if (row["trained"], row["read"], row["stop"]) == ("full", HALF, 64)}  # fmt: skip
    more = np.mean([row["loss"] - base[row["seed"]] for row in position
                    if (row["trained"], row["stop"]) == (HALF, 64)])  # fmt: skip
    assert lines[-1]["last, above trained in full"].startswith(f"{more:.3f} (")
    assert rows_of("windowed_training", rows) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policies": ("window:window=8",)}, "what windows are compared with is missing; add full"),
        ({"batch": 3}, "a step of 48 tokens holds no row of 64; give times=3 at most"),
        ({"read_scalings": ("yarm:factor=4",)}, "no rotary schedule is called 'yarm'"),
        ({"contexts": 99}, "the held-out end of the text has 36 rows of 64 bytes"),
    ],
)
def test_readings_that_cannot_be_are_refused(fields, message):
    config = request.parse("windowed_training", ["--config=windowed_training:tiny"]).config
    config.update(fields)
    with pytest.raises(InputError, match=message):
        windowed_training.check(config)
