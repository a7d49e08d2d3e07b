"""Schedules: continuity at every boundary, end values, and resuming from the step alone."""

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.scaling.schedules import Cosine, Infinite

INFINITE = [
    Infinite(3e-4, 1.65e-4, 3e-5, 100, 500, 900, 1000, shape)
    for shape in ("cosine", "inverse_sqrt")
]


@pytest.mark.parametrize("schedule", [Cosine(3e-4, 3e-5, 100, 1000), *INFINITE])
def test_a_schedule_is_continuous_and_traceable(schedule):
    steps = np.arange(1001)
    traced = jax.jit(schedule)
    rates = np.asarray(traced(steps))
    assert rates[0] == 0
    assert np.abs(np.diff(rates)).max() <= 3e-4 / 100 * 1.2
    assert rates.max() == pytest.approx(3e-4, rel=1e-5)
    assert rates[1000] == pytest.approx(3e-5, rel=1e-5)
    resumed = np.asarray(traced(np.arange(437, 1001)))[:2]
    np.testing.assert_allclose(resumed, rates[437:439], rtol=1e-6)


@pytest.mark.parametrize("schedule", INFINITE)
def test_the_constant_phase_is_constant(schedule):
    np.testing.assert_allclose(
        np.asarray(jax.jit(schedule)(np.arange(500, 901))), 1.65e-4, rtol=1e-6
    )


def test_phases_out_of_order_are_refused():
    with pytest.raises(InputError, match="must increase"):
        Infinite(3e-4, 1.65e-4, 3e-5, 100, 90, 900, 1000)
    with pytest.raises(InputError, match="warmup"):
        Cosine(3e-4, 3e-5, 1000, 1000)
