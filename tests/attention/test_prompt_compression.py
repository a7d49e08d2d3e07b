"""Prompts kept in less memory: exact where nothing goes, NumPy's choice where something does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import attend, cache
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policy import Full
from lminf.errors import InputError
from tests.attention import cases, oracle
from tests.attention.cases import ATOL, TOKENS

PROMPT = 16  # tokens of a row without padding; the other TOKENS - PROMPT are written
PADS = (0, 4)


def stored_after(policy, scoring, q, k, v, pads=PADS, before=lambda stored: stored):
    """The cache when the prompt has been read, and condensed."""
    at = jnp.asarray(cases.padded(pads))[:, :PROMPT]
    shape = cache.CacheShape(q.shape[0], TOKENS, q.shape[2], *k.shape[2:], k.dtype)
    stored = cache.create(policy, shape, layers=1)
    pos, held = stored.pos, stored.kv
    for piece in (slice(0, 10), slice(10, PROMPT)):
        step, pos = attend.extend(policy, scoring, stored.layout, pos, at[:, piece])
        _, held = step(q[:, piece], k[:, piece], v[:, piece], held, 0)
    stored = stored.updated(held, pos)
    return before(policy.compress_prompt(scoring, stored, length=PROMPT, room=TOKENS - PROMPT))


def written(policy, scoring, arrays, size, pads=PADS, before=lambda stored: stored):
    """[B, TOKENS - PROMPT, N, H], read `size` tokens at a time."""
    at = jnp.asarray(cases.padded(pads))[:, PROMPT:]

    @cases.compiled
    def run(q, k, v):
        stored = stored_after(policy, scoring, q, k, v, pads, before)

        def read(carry, piece):
            held, pos = carry
            step, pos = attend.extend(policy, scoring, stored.layout, pos, piece[0])
            out, held = step(*piece[1:], held, 0)
            return (held, pos), out

        def cut(x):
            return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

        pieces = tuple(cut(x) for x in (at, *(x[:, PROMPT:] for x in (q, k, v))))
        _, out = jax.lax.scan(read, (stored.kv, stored.pos), pieces)
        return out.swapaxes(0, 1).reshape(len(q), -1, *q.shape[2:])

    return np.asarray(run(*arrays))


@pytest.mark.parametrize(
    ("policy", "encoding", "size"),
    [
        (SnapKV(TOKENS, window=5), "alibi", 4),
        pytest.param(ThinK(0.0, recent=5), "rotary", 1, marks=pytest.mark.slow),
        pytest.param(ThinK(0.0, recent=5, capacity=TOKENS), "none", 4, marks=pytest.mark.slow),
        pytest.param(SnapKV(TOKENS, window=5), "yarn", 1, marks=pytest.mark.slow),
    ],
)
def test_where_nothing_goes_it_is_full_attention(policy, encoding, size):
    scoring, arrays = cases.scoring(encoding), cases.arrays(2)
    full = cases.compiled(cases.reference(Full(), scoring, cases.padded(PADS)))(*arrays)
    found = written(policy, scoring, arrays, size)
    np.testing.assert_allclose(found, np.asarray(full)[:, PROMPT:], atol=ATOL)


# --- What goes, in NumPy --------------------------------------------------------------------------


def turned(x, at, encoding):
    """[T, heads, H] at positions [T], float64: the `half` layout."""
    half = encoding.dim // 2
    angle = at[:, None] * encoding.scaling.frequencies(encoding.base, encoding.dim)
    turn = np.exp(1j * angle)[:, None]
    both = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([both.real, both.imag], -1)


def expected(policy, scoring, q, k, v, pad):
    """Attention of one row [T, heads, H] with older keys and channels masked, not removed."""
    q, k, v = (x[pad:].astype(np.float64) for x in (q, k, v))
    end, asking = PROMPT - pad, policy.observation_window
    at = np.arange(len(q))
    q, k = turned(q, at, scoring.encoding), turned(k, at, scoring.encoding)
    group = q.shape[1] // k.shape[1]
    out = np.zeros((TOKENS - PROMPT, *q.shape[1:]))
    for head in range(k.shape[1]):
        queries = q[:, head * group : (head + 1) * group]  # [T, G, H]
        old = np.arange(end - asking)
        if policy.capacity is not None:
            scores = np.einsum("tgh,sh->gts", queries[end - asking : end], k[:end, head])
            scores = np.where(
                np.arange(end) <= np.arange(end - asking, end)[:, None], scores, -np.inf
            )
            mass = weights_of(scores * scoring.scale).sum((0, 1))
            before = np.pad(
                mass[: end - asking], policy.pooling // 2
            )  # votes for the window are none
            pooled = np.convolve(before, np.ones(policy.pooling), "valid")
            old = np.sort(np.argsort(-pooled)[: policy.capacity - asking])
        kept = np.concatenate([old, np.arange(end - asking, len(k))])
        in_prompt = kept[kept < end]
        channel = np.square(queries[end - asking : end]).mean((0, 1))
        channel *= np.square(k[in_prompt, head]).mean(0)
        width = policy.channels_kept(k.shape[2])
        weak = np.argsort(channel)[: k.shape[2] - width]
        own = k[:, head].copy()
        own[np.ix_(old, weak)] = 0
        for t in range(end, len(q)):
            seen = kept[kept <= t]
            weights = weights_of(queries[t] @ own[seen].T * scoring.scale)
            out[t - end, head * group : (head + 1) * group] = weights @ v[seen, head]
    return out


def weights_of(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("policy", "size"),
    [
        pytest.param(ThinK(0.4, recent=5), 1, marks=pytest.mark.slow),
        pytest.param(SnapKV(9, window=5, pooling=3), 4, marks=pytest.mark.slow),
        (ThinK(0.5, recent=4, capacity=10), 1),
    ],
)
def test_removing_channels_and_tokens_is_masking_them(policy, size):
    scoring, arrays = cases.scoring("rotary"), cases.arrays(2)
    found = written(policy, scoring, arrays, size)
    for row, pad in enumerate(PADS):
        one = expected(policy, scoring, *(x[row] for x in arrays), pad)
        np.testing.assert_allclose(found[row], one, atol=ATOL)


@pytest.mark.slow
def test_where_the_older_tokens_lie_changes_nothing():
    scoring, arrays = cases.scoring("alibi"), cases.arrays(2)
    policy = SnapKV(9, window=5, pooling=1)

    def mixed(stored):
        order = np.random.default_rng(0).permutation(stored.state["k"].shape[2])
        extra = {name: x[:, :, order] for name, x in stored.state.items()}
        return cache.Cache(stored.k, stored.v, stored.pos, stored.layout, extra)

    plain = written(policy, scoring, arrays, 1)
    np.testing.assert_allclose(written(policy, scoring, arrays, 1, before=mixed), plain, atol=ATOL)


@pytest.mark.slow
def test_channels_that_are_zero_go_first_and_cost_nothing():
    scoring, (q, k, v) = cases.scoring("none"), cases.arrays(2)
    k = k.copy()
    k[..., [1, 4, 6]] = 0
    at = cases.padded(PADS)
    full = oracle.attention(Full(), scoring, q, k, v, q_pos=at, k_pos=at)
    found = written(ThinK(0.4, recent=5), scoring, (q, k, v), 1)
    np.testing.assert_allclose(found, full[:, PROMPT:], atol=ATOL)


def test_memory_of_what_is_older_falls_by_half_the_ratio():
    scoring = cases.scoring("rotary")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cases.arrays(2)]

    def older_bytes(policy):
        extra = jax.eval_shape(functools.partial(stored_after, policy, scoring), *arrays).state
        return sum(extra[name].size * 4 for name in ("k", "v"))

    whole = older_bytes(ThinK(0.0, recent=4))
    assert whole == 2 * cases.BATCH * (PROMPT - 4) * cases.KV_HEADS * cases.WIDTH * 4
    assert older_bytes(ThinK(0.5, recent=4)) == whole * (1 - 0.5 / 2)
    assert older_bytes(SnapKV(10, window=4)) == whole * 6 // 12
    assert older_bytes(ThinK(0.25, recent=4, capacity=10)) == whole * 6 // 12 * (1 - 0.25 / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(32), "capacity=32 with window=32: give capacity>=33"),
        (lambda: SnapKV(64, pooling=4), "pooling=4: give an odd number"),
        (lambda: ThinK(1.0), r"ThinK.ratio is 1.0; give a finite number of at least 0 and below 1"),
        (lambda: ThinK(recent=0), "ThinK.recent is 0; give a whole number of at least 1"),
        (lambda: ThinK(recent=8, capacity=8), "capacity=8 with recent=8: give capacity>=9"),
    ],
)
def test_bad_settings_are_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.slow
def test_a_prompt_is_read_in_full():
    scoring, arrays = cases.scoring("rotary"), cases.arrays(1)
    at = jnp.asarray(cases.padded(PADS))
    form = attend.prefill(SnapKV(6, window=2), scoring, at)
    full = cases.reference(Full(), scoring, at)
    found, plain = cases.compiled(lambda *x: (form(*x), full(*x)))(*arrays)
    np.testing.assert_allclose(found, plain, atol=ATOL)
