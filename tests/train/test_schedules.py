import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.train.schedules import WSD, Constant, Cosine, Infinite, Rewarm, check_steps

STEPS = 100
ALL = (
    Constant(1e-3, warmup=10),
    Cosine(1e-3, 1e-4, warmup=10),
    WSD(1e-3, 1e-4, warmup=10, decay=20),
    Infinite(3e-4, 1.65e-4, 3e-5, warmup=10, cooldown=30, anneal=20),
    Infinite(3e-4, 1.65e-4, 3e-5, warmup=10, cooldown=30, anneal=20, shape="inverse_sqrt"),
    Rewarm(1e-3, 1e-4, starts=(40,), warm_share=0.2),
)


def rates(schedule, steps=None):
    steps = np.arange(STEPS + 1) if steps is None else steps
    return np.asarray(jax.jit(jax.vmap(lambda step: schedule(step, STEPS)))(steps))


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_it_starts_at_nothing_and_never_jumps(schedule):
    fine = rates(schedule, np.linspace(0, STEPS, 4001))
    assert fine[0] == 0
    steepest = schedule.peak / 8 / 40  # 8 steps is the shortest warm-up, 40 points a step
    assert np.abs(np.diff(fine)).max() <= 1.01 * steepest
    assert fine.max() == pytest.approx(schedule.peak, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(1e-4, 1e-3, warmup=1), "Cosine.floor is 0.001, above Cosine.peak=0.0001"),
        (lambda: WSD(1e-4, 1e-3, warmup=1, decay=1), "WSD.floor is 0.001, above WSD.peak"),
        (lambda: Rewarm(1e-4, 1e-3, starts=()), "Rewarm.floor is 0.001, above Rewarm.peak"),
        (lambda: Infinite(1e-4, 1e-3, 1e-5, 1, 1, 1), "Infinite.constant is 0.001, above Infinite"),
        (lambda: Infinite(1e-2, 1e-3, 2e-3, 1, 1, 1), "Infinite.floor is 0.002, above Infinite.co"),
    ],
)
def test_rates_that_do_not_fall_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_phases_that_are_longer_than_the_run_are_refused(schedule):
    check_steps(schedule, STEPS)
    with pytest.raises(InputError, match=r"give phases that fit|before the last data"):
        check_steps(schedule, 9)


def test_cosine_is_its_formula():
    found = rates(Cosine(1e-3, 1e-4, warmup=10))
    assert found[5] == pytest.approx(5e-4)
    assert found[10] == pytest.approx(1e-3)
    assert found[55] == pytest.approx((1e-3 + 1e-4) / 2)
    assert found[100] == pytest.approx(1e-4)


def test_wsd_is_stable_until_its_decay():
    found = rates(WSD(1e-3, 1e-4, warmup=10, decay=20))
    np.testing.assert_allclose(found[10:81], 1e-3, rtol=1e-6)
    assert found[90] == pytest.approx(5.5e-4)
    assert found[100] == pytest.approx(1e-4)


@pytest.mark.parametrize("shape", ["cosine", "inverse_sqrt"])
def test_infinite_reaches_every_corner(shape):
    found = rates(Infinite(3e-4, 1.65e-4, 3e-5, warmup=10, cooldown=30, anneal=20, shape=shape))
    assert found[10] == pytest.approx(3e-4)
    np.testing.assert_allclose(found[40:81], 1.65e-4, rtol=1e-5)
    assert found[90] == pytest.approx((1.65e-4 * 3e-5) ** 0.5, rel=1e-5)  # halfway, in logarithms
    assert found[100] == pytest.approx(3e-5, rel=1e-5)


def test_rewarming_returns_to_the_peak_and_decays_to_the_floor_again():
    found = rates(Rewarm(1e-3, 1e-4, starts=(40,), warm_share=0.2))
    assert found[8] == pytest.approx(1e-3)
    assert found[40] == pytest.approx(1e-4)
    assert found[52] == pytest.approx(1e-3)
    assert found[100] == pytest.approx(1e-4)


@pytest.mark.parametrize("schedule", [Constant(0.5), *ALL], ids=str)
def test_steps_at_once_have_the_rates_of_each(schedule):
    at_once = schedule(np.arange(4), STEPS)
    assert at_once.shape == (4,)
    np.testing.assert_allclose(at_once, [schedule(step, STEPS) for step in range(4)], rtol=1e-6)
