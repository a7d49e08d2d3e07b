"""Rules of acceptance: the law of one step, summed over all that can happen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lminf.errors import InputError
from lminf.lm.acceptance import RAPID, STANDARD, verify

TOKENS = 8
TAIL = 0.1


@pytest.fixture(params=range(4))
def pair(request):
    """p and q of so many tokens, the second draw with zeros in both."""
    rng = np.random.default_rng(request.param)
    p, q = rng.dirichlet(np.full(TOKENS, 0.5), size=2)
    if request.param == 1:
        p[:3], q[2:5] = 0, 0
        p, q = p / p.sum(), q / q.sum()
    return p.astype(np.float32), q.astype(np.float32)


def law(rule, p, q):
    """The probability of each token: x is drawn from q and accepted, or anything is drawn and
    rejected and x then drawn from the residual.
    """
    accept = np.asarray(rule.acceptance(jnp.asarray(p), jnp.asarray(q)), float)
    residual = np.asarray(rule.residual(jnp.asarray(p), jnp.asarray(q)), float)
    out, rejected = np.zeros(TOKENS), 0.0
    for x in range(TOKENS):
        out[x] += q[x] * accept[x]
        rejected += q[x] * (1 - accept[x])
    for x in range(TOKENS):
        out[x] += rejected * residual[x]
    return out


def shifted(p, q, eta):
    """softmax(z - eta T(p - q)), in float64, T being 0 where q < 0.1 max q."""
    weights = []
    for expected, drafted in zip(p.astype(float), q.astype(float), strict=True):
        pull = expected - drafted if drafted >= TAIL * q.max() else 0.0
        weights.append(expected * np.exp(-eta * pull))
    return np.array(weights) / sum(weights)


def published_law(p, q, eta):
    """out = min(q, p') + (1 - sum min(q, p')) norm(max(p - min(q, p'), 0))."""
    common = np.minimum(q, shifted(p, q, eta))
    rest = np.maximum(p - common, 0)
    return common + (1 - common.sum()) * rest / rest.sum()


def test_standard_tokens_follow_the_model(pair):
    np.testing.assert_allclose(law(STANDARD, *pair), pair[0], atol=1e-6)


@pytest.mark.parametrize("residual_of", ["published", "shifted"])
def test_rapid_without_a_shift_is_standard(pair, residual_of):
    rule = RAPID(0.0, residual_of=residual_of)
    np.testing.assert_allclose(law(rule, *pair), pair[0], atol=1e-6)


@pytest.mark.parametrize("eta", [1.0, 10.0])
def test_rapid_tokens_follow_what_their_residual_makes_of_the_model(pair, eta):
    p, q = pair
    expected = shifted(p, q, eta)
    np.testing.assert_allclose(law(RAPID(eta, residual_of="shifted"), p, q), expected, atol=1e-6)
    assert np.abs(expected - p).max() > 0.01
    np.testing.assert_allclose(law(RAPID(eta), p, q), published_law(p, q, eta), atol=1e-6)


def test_the_published_residual_can_give_the_drafts_own_law():
    """The example of the specification: the output is not p but q."""
    p, q = np.array([0.5, 0.5], np.float32), np.array([0.9, 0.1], np.float32)
    p, q = (np.pad(x, (0, TOKENS - 2)) for x in (p, q))
    np.testing.assert_allclose(law(RAPID(10.0), p, q), q, atol=1e-6)


def test_more_is_accepted_as_a_small_shift_grows(pair):
    """A great one overshoots: at eta = 10, p' is farther from q than p is in three of these."""
    p, q = map(jnp.asarray, pair)
    accepted = [float((q * RAPID(eta).acceptance(p, q)).sum()) for eta in (0.0, 0.5, 1.0, 2.0)]
    if (pair[0] > 0).all():
        assert np.all(np.diff(accepted) > 0)
    np.testing.assert_allclose(RAPID(10.0).acceptance(p, p), 1, rtol=1e-5)  # a draft that agrees


def test_two_tokens_and_the_one_after_follow_the_model():
    """20,000 rows; counts of 2, 1 and 0 proposed tokens have the same law of their first token."""
    rows, size, rng = 20_000, 4, np.random.default_rng(0)
    p = rng.dirichlet(np.ones(size), size=3).astype(np.float32)
    q = rng.dirichlet(np.ones(size), size=2).astype(np.float32)
    drafted = np.stack(
        [rng.choice(size, rows, p=each.astype(float) / each.sum(dtype=float)) for each in q], 1
    )
    counts = rng.integers(0, 3, rows).astype(np.int32)
    accepted, following = (
        np.asarray(x)
        for x in jax.jit(verify, static_argnums=0)(
            STANDARD, *(np.broadcast_to(x.astype(np.float32), (rows, *x.shape)) for x in (p, q)),
            drafted.astype(np.int32), counts, key=jax.random.key(1),
        )
    )  # fmt: skip
    assert (accepted <= counts).all()
    for number in range(3):
        # The token at this place, of the rows that came so far: those before it were accepted.
        here = accepted >= number
        token = np.where(accepted > number, drafted[:, min(number, 1)], following)[here]
        observed = np.bincount(token, minlength=size)
        law = np.asarray(p[number], np.float64)
        expected = here.sum() * law / law.sum()  # scipy wants equal sums
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_shift_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"RAPID.eta is -1.0; give a finite number of at least 0"):
        RAPID(-1.0)
    with pytest.raises(InputError, match="residual_of='other'; give 'published' or 'shifted'"):
        RAPID(1.0, residual_of="other")
