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


def test_rows_are_pooled_by_their_columns():
    rows = [{"policy": policy, "depth": depth, "instances": 4, "score": right / 4}
            for policy, depth, right in (("a", 0, 4), ("b", 0, 0), ("a", 1, 1))]  # fmt: skip
    a, b = score.pooled(rows, ("policy",))
    assert a == {"policy": "a", "instances": 8, "score": 5 / 8, "low": a["low"], "high": a["high"]}
    assert (a["score"], a["low"], a["high"]) == score.success_rate(5, 8)
    assert score.count_text(b) == "0/4"
    assert score.interval_text(a) == "5/8 = 0.62 (0.31–0.86)"
