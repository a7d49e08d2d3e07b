import numpy as np
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


def test_an_interval_over_documents_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    for documents in (6, 12):
        covered = [
            low <= 3 <= high
            for _ in range(300)
            for _, low, high in [score.over_documents(random.normal(3, 1, documents))]
        ]
        assert 0.91 < np.mean(covered) < 0.985


def test_differences_of_the_same_documents_make_the_paired_bootstrap():
    """What documents have in common cancels, so that a small difference shows."""
    documents = np.random.default_rng(0).normal(0, 10, 12)
    gains = np.random.default_rng(1).normal(0.5, 0.1, 12)
    paired = score.over_documents((documents + gains) - documents)
    assert 0.3 < paired.low < paired.mean < paired.high < 0.7
    alone = score.over_documents(documents + gains)
    assert alone.high - alone.low > 5


@pytest.mark.parametrize("values", [[1.5], [1.0, 2.0]])
def test_one_or_two_documents_have_no_interval(values):
    interval = score.over_documents(values)
    assert interval == (1.5, -np.inf, np.inf)
    assert score.value_text(interval) == "1.50"
    assert score.value_text(score.Interval(0.5, -0.25, 1)) == "0.50 (-0.25 to 1.00)"


def test_questions_of_one_text_count_as_many_as_their_spread_shows():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        rates = rng.beta(1.2, 1.2, 16)  # a text is easy or hard for all its questions
        scores = (rng.random((16, 4)) < rates[:, None]).astype(float).ravel()
        interval = score.of_groups(list(scores), 4)
        covered += interval.low <= 0.5 <= interval.high
        widths.append(interval.high - interval.low)
    assert 0.91 <= covered / 400 <= 0.99
    independent = score.success_rate(32, 64)
    assert np.mean(widths) > 1.2 * (independent.high - independent.low)


def test_groups_that_agree_in_everything_are_one_trial_each():
    assert score.of_groups([1.0] * 12, 4) == score.success_rate(3, 3)
    alternating = score.of_groups([1.0, 0.0] * 20, 2)
    assert alternating == score.success_rate(20, 40)
    # The last group may be smaller, and scores may be shares.
    mean, low, high = score.of_groups([0.5, 0.75, 0.25, 1.0, 0.0, 0.5, 0.25], 2)
    assert 0 <= low < mean < high <= 1
