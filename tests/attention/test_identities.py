"""What every policy must satisfy under every encoding, against formulas in float64.

The fast lane takes every policy, every encoding and both GQA ratios, but not all their triples.
All rows but the first begin with padding.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.attention import attend, cache
from lminf.attention import reference as dense
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.kernels.common import masks
from tests.attention import cases, oracle
from tests.attention.cases import ATOL, COVER, OTHERS, POLICIES, TOKENS


def lanes(fast, every):
    """The cases of the fast lane, and the others marked slow."""
    return [*fast, *(pytest.param(*c, marks=pytest.mark.slow) for c in every if c not in fast)]


def cover(fast, every):
    return pytest.mark.parametrize(("policy", "encoding", "group"), lanes(fast, every))


def agree(found, expected):
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


def check_formulas(policies, encoding, group, *forms):
    """Every form of every policy against the formulas; one graph, which compiles much faster."""
    scoring, at = cases.scoring(encoding), cases.padded()
    arrays = cases.arrays(group)

    @cases.compiled
    def run(*arrays):
        return {name: [form(POLICIES[name], scoring, at)(*arrays) for form in forms]
                for name in policies}  # fmt: skip

    for name, outputs in run(*arrays).items():
        expected = oracle.attention(POLICIES[name], scoring, *arrays, q_pos=at, k_pos=at)
        assert np.all(expected[at < 0] == 0)
        for found in outputs:
            np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0, err_msg=name)


def whole(policy, scoring, at):
    return attend.prefill(policy, scoring, jnp.asarray(at), implementation="xla")


def decoded(policy, scoring, at):
    read = cases.chunks(policy, scoring, at, [1] * TOKENS, implementation="xla")
    return lambda q, k, v: read(q, k, v)[0]


@pytest.mark.parametrize(
    ("encoding", "group"),
    lanes(
        [("alibi", 1)],
        itertools.product(cases.ENCODINGS, (1, 3)),
    ),
)
def test_a_whole_text_attends_as_the_formulas_of_every_policy_say(encoding, group):
    check_formulas(POLICIES, encoding, group, whole)


SOME = [
    (e, g, [p for p, of, _ in COVER if of == e])
    for e, g in (("rotary", 1), ("partial", 3), ("alibi", 1), ("none", 3), ("yarn", 1))
]
ALL = [(encoding, 4 - group, list(POLICIES)) for encoding, group, _ in SOME]


@pytest.mark.parametrize(("encoding", "group", "policies"), lanes(SOME, ALL))
def test_the_reference_and_decoding_token_by_token_are_the_formulas(encoding, group, policies):
    check_formulas(policies, encoding, group, cases.reference, decoded)


# policy, encoding, group, implementation: the tiled form is what models run on long texts.
GRADIENTS = [
    ("lm_infinite", "partial", 3, "xla_chunked"),
    ("streaming", "alibi", 1, "xla"),
    ("self_extend", "none", 3, "xla"),
]


def gradient_cases(test):
    every = [*((*case, "xla_chunked") for case in OTHERS), ("rerope_log", "rotary", 1, "xla")]
    names = ("policy", "encoding", "group", "implementation")
    return pytest.mark.parametrize(names, lanes(GRADIENTS, every))(test)


@functools.cache
def differentiable(policy, encoding, group, implementation):
    """(q, k, v, ct) -> output and gradients."""
    del group
    scoring, at = cases.scoring(encoding, soft_cap=3.0), jnp.asarray(cases.padded())
    run = attend.prefill(POLICIES[policy], scoring, at, implementation=implementation)
    return cases.compiled(cases.with_gradients(run))


@gradient_cases
def test_values_and_gradients_are_the_references(policy, encoding, group, implementation):
    q, k, v = cases.arrays(group)
    scoring, at = cases.scoring(encoding, soft_cap=3.0), jnp.asarray(cases.padded())
    dense = cases.reference(POLICIES[policy], scoring, at)
    ct = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    out, grads = differentiable(policy, encoding, group, implementation)(q, k, v, ct)
    expected, expected_grads = cases.compiled(cases.with_gradients(dense))(q, k, v, ct)
    agree(out, expected)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, atol=10 * ATOL, rtol=0)
        assert not np.any(np.asarray(found)[np.asarray(at) < 0])


@gradient_cases
def test_a_query_is_blind_outside_what_its_policy_shows(policy, encoding, group, implementation):
    """d(output of i)/d(key, value of j) is exactly 0 where j is invisible, and not 0 elsewhere."""
    q, k, v = cases.arrays(group)
    at = cases.padded()
    for row, i in [(0, 0), (0, 4), (0, 11), (0, 23), (1, 2), (1, 4), (1, 12), (1, 23)]:
        ct = np.zeros(q.shape, np.float32)
        ct[row, i] = np.random.default_rng(i).normal(size=q.shape[2:])
        _, (dq, dk, dv) = differentiable(policy, encoding, group, implementation)(q, k, v, ct)
        for head in range(cases.KV_HEADS):
            part = POLICIES[policy]
            part = part.policies[head] if isinstance(part, PerHead) else part
            seen, _ = oracle.visible_and_distance(part, at[row, i], at[row])
            seen &= (at[row] >= 0) & (at[row, i] >= 0)
            for gradient in (dk, dv):
                size = np.abs(np.asarray(gradient)[row, :, head]).max(-1)
                assert not size[~seen].any()
                if gradient is dv or seen.sum() > 1:  # an only key weighs 1, whatever it is
                    assert size[seen].all()
            assert not np.any(np.asarray(dk)[1 - row])
        queries = np.abs(np.asarray(dq)).max((2, 3)) > 0
        assert not queries[1 - row].any()
        assert set(np.flatnonzero(queries[row])) <= {i}


# --- Chunks ---------------------------------------------------------------------------------------

SIZES = (1, 4, 5, 6, 7)  # of the window 5: one token, L-1, L, L+1, and a size beside it


@functools.cache
def reader(policy, encoding, size):
    """One chunk of `size` tokens against the cache, compiled once for any place in the text."""
    scoring, policy = cases.scoring(encoding), POLICIES[policy]
    layout = cache.layout_for(policy, TOKENS)

    def read(stored, at, q, k, v):
        held, stored_pos = stored
        step, stored_pos = attend.extend(
            policy, scoring, layout, stored_pos, at, implementation="reference"
        )
        out, held = step(q, k, v, held, 0)
        return out, (held, stored_pos)

    return cases.compiled(read)


@pytest.mark.parametrize(
    ("policy", "encoding", "group"),
    lanes(
        [("lm_infinite", "rotary", 1)],
        [("self_extend", "alibi", 1), ("streaming", "partial", 1), ("window", "rotary", 3),
         ("per_head_bounded", "none", 3), ("per_head_mixed", "yarn", 1)],
    ),
)  # fmt: skip
@settings(max_examples=15)
@given(data=st.data())
def test_any_partition_into_chunks_reads_the_same(policy, encoding, group, data):
    sizes, left = [], TOKENS
    while left:
        sizes.append(data.draw(st.sampled_from([s for s in SIZES if s <= left])))
        left -= sizes[-1]
    arrays, at = cases.arrays(group), cases.padded()
    scoring, chosen = cases.scoring(encoding), POLICIES[policy]
    heads = group * cases.KV_HEADS, cases.KV_HEADS
    shape = cache.CacheShape(cases.BATCH, TOKENS, *heads, cases.WIDTH, jnp.float32)
    empty = cache.create(chosen, shape, layers=1)
    stored, outs, start = (empty.kv, empty.pos), [], 0
    for size in sizes:
        piece = [x[:, start : start + size] for x in (at, *arrays)]
        out, stored = reader(policy, encoding, size)(stored, *piece)
        outs.append(out)
        start += size
    expected = oracle.attention(chosen, scoring, *arrays, q_pos=at, k_pos=at)
    agree(np.concatenate(outs, 1), expected)


@cover([("lm_infinite", "alibi", 3), ("rerope_log", "partial", 1)], OTHERS)
def test_chunks_through_the_tiled_form_read_the_same(policy, encoding, group):
    q, k, v = cases.arrays(group)
    scoring, policy, at = cases.scoring(encoding), POLICIES[policy], cases.padded((0, 9))
    run = cases.chunks(policy, scoring, at, [6] * 4, implementation="xla_chunked")
    out, *_ = cases.compiled(run)(q, k, v)
    agree(out, oracle.attention(policy, scoring, q, k, v, q_pos=at, k_pos=at))


# --- Sizes, packing, GQA --------------------------------------------------------------------------


def check_whole_and_read(policy, encoding, implementation):
    q, k, v = cases.arrays(1)
    scoring, at = cases.scoring(encoding), cases.padded()

    @cases.compiled
    def run(q, k, v):
        whole = attend.prefill(policy, scoring, jnp.asarray(at), implementation=implementation)
        sizes = [8, 8, *[1] * 8]
        read = cases.chunks(policy, scoring, at, sizes, implementation=implementation)
        return whole(q, k, v), read(q, k, v)[0]

    expected = oracle.attention(policy, scoring, q, k, v, q_pos=at, k_pos=at)
    for found in run(q, k, v):
        agree(found, expected)


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(1, TOKENS + 3),
        pytest.param(Streaming(TOKENS + 5, TOKENS + 2), marks=pytest.mark.slow),
        pytest.param(Lambda(1, 0), marks=pytest.mark.slow),
        pytest.param(LMInfinite(TOKENS, 1, distance=0), marks=pytest.mark.slow),
        pytest.param(SelfExtend(1, TOKENS + 9), marks=pytest.mark.slow),
        pytest.param(LeakyReRoPE(TOKENS - 1, 1), marks=pytest.mark.slow),
    ],
    ids=lambda policy: policy.name,
)
def test_windows_and_sinks_of_any_size(policy):
    check_whole_and_read(policy, "rotary", "xla")


@pytest.mark.slow
@settings(max_examples=6)
@given(
    kind=st.sampled_from([Lambda, LMInfinite, Streaming]),
    window=st.integers(1, TOKENS + 4),
    sinks=st.integers(0, TOKENS + 4),
    implementation=st.sampled_from(["xla", "xla_chunked"]),
)
def test_windows_and_sinks_of_random_size(kind, window, sinks, implementation):
    check_whole_and_read(kind(window, sinks), "partial", implementation)


FITTING = {
    "window": Window(TOKENS),
    "lm_infinite": LMInfinite(TOKENS, 3),
    "streaming": Streaming(TOKENS, 3),
    "rerope": ReRoPE(TOKENS, log_from=TOKENS),
    "leaky": LeakyReRoPE(TOKENS, 4),
    "self_extend": SelfExtend(TOKENS, 5),
    "per_head": PerHead((Lambda(TOKENS + 1, 2), SelfExtend(TOKENS + 2, 7))),
}


def test_every_policy_is_full_while_the_text_fits_the_window():
    q, k, v = cases.arrays(3)
    scoring, at = cases.scoring("rotary"), jnp.asarray(cases.padded())

    @cases.compiled
    def run(q, k, v):
        policies = {"full": Full(), **FITTING}
        return {n: cases.reference(p, scoring, at)(q, k, v) for n, p in policies.items()}

    found = run(q, k, v)
    for name in FITTING:
        np.testing.assert_allclose(found[name], found["full"], atol=1e-6, rtol=0, err_msg=name)


@cover([("lm_infinite", "alibi", 3), ("self_extend", "rotary", 1)], OTHERS)
def test_packed_documents_are_separate_documents(policy, encoding, group):
    q, k, v = cases.arrays(group)
    scoring, policy = cases.scoring(encoding), POLICIES[policy]
    at, segments = np.zeros((2, TOKENS), np.int32), np.full((2, TOKENS), masks.PADDING, np.int32)
    documents = [(0, 0, 9), (0, 9, 10), (0, 10, 24), (1, 0, 13), (1, 15, 20)]  # row, from, to
    for i, (row, start, end) in enumerate(documents):
        at[row, start:end], segments[row, start:end] = np.arange(end - start), 7 - i
    at[1, 20:], segments[1, 20:] = -1, 99  # padding by position; [1, 13:15] is by segment

    @cases.compiled
    def run(q, k, v):
        packed = jnp.asarray(segments)
        whole = attend.prefill(
            policy, scoring, jnp.asarray(at), segments=packed, implementation="xla_chunked"
        )
        return cases.reference(policy, scoring, jnp.asarray(at), packed)(q, k, v), whole(q, k, v)

    expected = np.zeros(q.shape)
    for row, start, end in documents:
        own = np.arange(end - start)[None]
        alone = [x[row : row + 1, start:end] for x in (q, k, v)]
        out = oracle.attention(policy, scoring, *alone, q_pos=own, k_pos=own)
        expected[row, start:end] = out[0]
    for found in run(q, k, v):
        agree(found, expected)


def test_grouped_heads_are_repeated_heads():
    q, k, v = cases.arrays(3)
    scoring, at = cases.scoring("alibi"), jnp.asarray(cases.padded())
    policy = POLICIES["per_head_bounded"]
    repeated = PerHead(tuple(part for part in policy.policies for _ in range(3)))

    @cases.compiled
    def run(q, k, v):
        many_k, many_v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
        return (
            attend.prefill(policy, scoring, at)(q, k, v),
            attend.prefill(repeated, scoring, at)(q, many_k, many_v),
        )

    grouped, separate = run(q, k, v)
    np.testing.assert_allclose(grouped, separate, atol=1e-6, rtol=0)


def test_logits_are_those_of_the_references_softmax():
    q, k, v = cases.arrays(3)
    scoring, policy, at = cases.scoring("alibi", soft_cap=3.0), Streaming(5, 3), cases.padded()
    at = jnp.asarray(at)

    @cases.compiled
    def run(q, k, v):
        logits = dense.logits(policy, scoring, q, k, q_pos=at, k_pos=at)
        weights = jnp.exp(logits - jnp.maximum(logits.max(-1, keepdims=True), -1e9))
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 3, axis=2))
        return mixed, cases.reference(policy, scoring, at)(q, k, v)

    agree(*run(q, k, v))


def test_bfloat16_stays_within_its_rounding():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in cases.arrays(3)]
    scoring, policy, at = cases.scoring("rotary"), POLICIES["lm_infinite"], cases.padded()

    @cases.compiled
    def run(q, k, v):
        read = cases.chunks(policy, scoring, at, [6, 6, *[1] * 12], implementation="xla")
        return whole(policy, scoring, at)(q, k, v), read(q, k, v)[0]

    exact = [np.asarray(x, np.float32) for x in arrays]
    expected = oracle.attention(policy, scoring, *exact, q_pos=at, k_pos=at)
    for found in run(*arrays):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2, rtol=0)
