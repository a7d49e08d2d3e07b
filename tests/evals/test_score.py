import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lminf.evals import score


@given(st.integers(1, 300), st.data())
def test_the_interval_equals_scipys(trials, data):
    successes = data.draw(st.integers(0, trials))
    ours = score.success_rate(successes, trials)
    theirs = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert ours.mean == successes / trials
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert 0 <= ours.low <= ours.mean + 1e-12
    assert ours.mean <= ours.high + 1e-12 <= 1 + 1e-11


def test_no_trials_are_no_rate():
    with pytest.raises(ValueError, match="0 trials"):
        score.success_rate(0, 0)
