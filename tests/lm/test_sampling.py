"""What is drawn, from logits that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lminf.errors import InputError
from lminf.lm.generate import GREEDY, Sampling, sample
from tests.attention import cases

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 2.5, 0.0], np.float32)
ROWS = 20_000


def draw(sampling, logits=LOGITS, seed=0):
    """ROWS draws."""
    rows = jnp.broadcast_to(logits, (ROWS, len(logits)))
    run = cases.compiled(lambda rows, key: sample(rows, sampling, key=key))
    tokens = run(rows, jax.random.key(seed))
    assert tokens.dtype == jnp.int32
    assert tokens.shape == (ROWS,)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def follows(counts, chances):
    """Chi-square, and nothing at all where the chance is zero."""
    chances = np.asarray(chances) / np.sum(chances)
    assert (counts[chances == 0] == 0).all()
    some = chances > 0
    if some.sum() > 1:
        assert stats.chisquare(counts[some], ROWS * chances[some]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_tempered_softmax(temperature):
    follows(draw(Sampling(temperature)), special.softmax(LOGITS.astype(float) / temperature))


def test_greedy_takes_the_first_of_the_largest():
    assert draw(GREEDY)[1] == ROWS
    tied = np.array([0.0, 2.0, 2.0], np.float32)
    assert draw(GREEDY, tied)[1] == ROWS
    assert draw(Sampling(1.0, top_k=1))[1] == ROWS


def test_a_tiny_temperature_is_nearly_greedy():
    big = np.array([100.0, 50.0, 99.0], np.float32)
    assert draw(Sampling(1e-40), big)[0] == ROWS


@pytest.mark.parametrize("k", [2, 3, 6, 100])
def test_top_k_draws_among_just_k(k):
    """Equal logits do not let more in: tokens 3 and 4 tie for the second place."""
    kept = np.argsort(-LOGITS, kind="stable")[:k]
    chances = np.zeros(len(LOGITS))
    chances[kept] = special.softmax(LOGITS[kept].astype(float))
    follows(draw(Sampling(1.0, top_k=k)), chances)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("k", [None, 3])
def test_top_p_draws_among_the_fewest_that_hold_p(p, k):
    order = np.argsort(-LOGITS, kind="stable")[:k]
    chances = special.softmax(LOGITS[order].astype(float))
    count = 1 + int((np.cumsum(chances)[:-1] < p).sum())
    kept = np.zeros(len(LOGITS))
    kept[order[:count]] = chances[:count]
    follows(draw(Sampling(1.0, top_k=k, top_p=p)), kept)


def test_temperature_comes_before_top_p():
    flat = special.softmax(LOGITS.astype(float) / 10)
    assert (flat < 0.3).all()  # so 0.5 needs three of them, where untempered two hold it
    counts = draw(Sampling(10.0, top_p=0.5))
    assert (counts > 0).sum() == 3


@settings(max_examples=30)
@given(
    temperature=st.floats(max_value=-1e-9) | st.just(float("nan")),
    k=st.integers(max_value=0),
    p=st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | st.just(float("nan")),
)
def test_settings_that_mean_nothing_are_refused(temperature, k, p):
    with pytest.raises(InputError, match=r"temperature=.*: give 0 .greedy. or more"):
        Sampling(temperature)
    with pytest.raises(InputError, match=r"top_k=.*: give at least 1 token"):
        Sampling(1.0, top_k=k)
    with pytest.raises(InputError, match=r"top_p=.*: give a probability in"):
        Sampling(1.0, top_p=p)
