"""Policies that choose by content: the papers' formulas, the identities, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import attend, cache
from lminf.attention.policies.block_topk import MoBA
from lminf.attention.policies.hip import HiP, InfiniteHiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.longheads import LongHeads
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import POLICIES as POLICY_TABLE
from lminf.attention.policy import (
    Full,
    Lambda,
    LMInfinite,
    PerHead,
    Window,
)
from lminf.config import parse_choice
from lminf.errors import InputError
from lminf.models import cost, decoder
from lminf.models.layer_policies import by_layer, check_rotary
from tests.attention import cases, sparse_oracle
from tests.attention.cases import ATOL, BATCH, WIDTH
from tests.models import specs

TOKENS = 40
PADS = (0, 5)
POLICIES = {
    "infllm": InfLLM(window=8, sinks=3, topk=2, block=4, repr_topk=2, exec_block=4),
    "topk": TopK(window=8, sinks=3, topk=2, from_layer=0),
    "longheads": LongHeads(attended=16, chunk=4),
    "hip": HiP(
        topk=8, window=6, sinks=3, block=2, query_block=4, query_stride=2, refresh=3,
        dense_layers=0,
    ),
    "infinite_hip": InfiniteHiP(
        chunk=(8, 2), topk=(16, 6), refresh=(6, 2), window=5, sinks=3, query_block=4,
    ),
    "moba": MoBA(block=4, topk=3),
}  # fmt: skip
OTHERS = {
    "infllm": [
        InfLLM(8, sinks=0, topk=1, block=2, repr_topk=1, exec_block=16),
        InfLLM(4, sinks=2, topk=2, block=1, repr_topk=1, exec_block=1),
        InfLLM(8, sinks=1, topk=0, block=8, repr_topk=8, exec_block=8),
    ],
    "topk": [TopK(4, sinks=0, topk=40, at=9, from_layer=1, distance=3)],
    "longheads": [LongHeads(12, chunk=4), LongHeads(24, chunk=8)],
    "hip": [
        HiP(4, window=4, sinks=0, block=1, query_block=4, query_stride=1, refresh=1,
            dense_layers=0),
        HiP(40, window=3, sinks=1, block=2, query_block=16, query_stride=3, refresh=4,
            dense_layers=0),
    ],
    "infinite_hip": [
        InfiniteHiP((1,), (4,), (2,), window=4, sinks=0, query_block=1, ordered_layers=0),
        InfiniteHiP((12, 6, 3), (24, 12, 6), (5, 3, 7), window=3, sinks=1, query_block=16,
                    ordered_layers=1),
    ],
    "moba": [MoBA(block=3, topk=2), MoBA(block=64, topk=4), MoBA(block=1, topk=9)],
}  # fmt: skip
ORACLES = {
    "infllm": sparse_oracle.infllm,
    "topk": sparse_oracle.top_k,
    "longheads": sparse_oracle.long_heads,
    "hip": sparse_oracle.hip,
    "infinite_hip": sparse_oracle.infinite_hip,
    "moba": sparse_oracle.moba,
}
# Sizes of the calls: at once; in chunks of whole groups; a prompt, and then token by token.
CALLS = ((TOKENS,), (16, 16, 8), (16, *[1] * 24))


def lanes(*fast):
    """The policies by name, those besides `fast` in the slow lane."""
    return pytest.mark.parametrize(
        "name", [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES]
    )


def agree(found, expected):
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


def expected(name, policy, scoring, arrays, calls):
    """Of every row, read as its own tokens of each call; zero at padding."""
    out = np.zeros(arrays[0].shape)
    for row, pad in enumerate(PADS):
        ends = np.maximum(np.cumsum(calls) - pad, 0)
        own = [int(n) for n in np.diff(ends, prepend=0) if n]
        text = [np.asarray(x[row, pad:], np.float64) for x in arrays]
        out[row, pad:] = ORACLES[name](policy, scoring, *text, own)
    return out


def read(policy, scoring, calls, at=None, capacity=TOKENS):
    at = cases.padded(PADS, TOKENS) if at is None else at
    run = cases.chunks(policy, scoring, at, calls, implementation=None, capacity=capacity)
    return lambda q, k, v: run(q, k, v)[0]


def check(name, policy, encoding, group, every, kv_heads=cases.KV_HEADS):
    scoring = cases.scoring(encoding, soft_cap=4.0 if encoding == "partial" else None)
    arrays = cases.arrays(group, tokens=TOKENS, kv_heads=kv_heads)

    @cases.compiled
    def run(*arrays):
        return [read(policy, scoring, calls)(*arrays) for calls in every]

    for calls, found in zip(every, run(*arrays), strict=True):
        agree(found, expected(name, policy, scoring, arrays, calls))


@lanes("infllm", "moba")
def test_reading_and_decoding_are_the_formulas(name):
    """The temperature of YaRN is in the channels that are rotated, and in no others."""
    check(name, POLICIES[name], "partial_yarn", 3, CALLS[2:])


@lanes()
def test_all_heads_may_share_one_key_head(name):
    check(name, POLICIES[name], "rotary", 3, CALLS[2:], kv_heads=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "group"), [("rotary", 1), ("partial", 3), ("yarn", 1), ("partial_yarn", 3)]
)
@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, policy) for name in POLICIES for policy in (POLICIES[name], *OTHERS[name])],
    ids=str,
)
def test_every_setting_is_the_formulas_under_every_encoding(name, policy, encoding, group):
    check(name, policy, encoding, group, CALLS)


# --- Identities -----------------------------------------------------------------------------------


EVERY_BLOCK = InfLLM(8, sinks=0, topk=8, block=4, repr_topk=1, exec_block=4)
NO_BLOCK = InfLLM(8, sinks=3, topk=0, block=1, repr_topk=1, exec_block=1)
SAME = [
    (NO_BLOCK, LMInfinite(8, 3, distance=7)),
    (EVERY_BLOCK, LMInfinite(8, TOKENS, distance=7)),  # ReRoPE with another constant
    (InfLLM(TOKENS, sinks=3, topk=2, block=5, exec_block=8), Full()),
    (TopK(TOKENS, sinks=3, topk=2, from_layer=0), Full()),
    (TopK(8, sinks=3, topk=2, from_layer=1), LMInfinite(8, 3)),  # which begins at the next layer
    (LongHeads(TOKENS + 8, chunk=8), Full()),
    (LongHeads(TOKENS, chunk=4), Full()),
    (HiP(TOKENS, 3, sinks=2, block=2, query_block=8, dense_layers=0), Full()),
    (HiP(4, 3, sinks=2, block=2, query_block=8, dense_layers=1), Full()),
    (InfiniteHiP((8, 2), (TOKENS, TOKENS), (1, 1), window=3, sinks=2, query_block=8), Full()),
    (InfiniteHiP((2,), (4,), (1,), window=3, sinks=2, query_block=8, dense_layers=1), Full()),
    (MoBA(block=4, topk=TOKENS), Full()),
]


@pytest.mark.parametrize(
    ("one", "other"),
    [SAME[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SAME[1:])],
    ids=lambda policy: policy.name,
)
def test_it_becomes_another_policy(one, other):
    at = jnp.asarray(cases.padded(PADS, TOKENS))
    scoring = cases.scoring("partial_yarn")  # under which only rotated channels are tempered

    @cases.compiled
    def run(*arrays):
        return [
            attend.prefill(policy, scoring, at, implementation="xla")(*arrays)
            for policy in (one, other)
        ]

    agree(*run(*cases.arrays(3, tokens=TOKENS)))


@functools.cache
def reader(policy, group):
    """A text of one row at once, compiled once for every text."""
    at = np.arange(TOKENS, dtype=np.int32)[None]
    return cases.compiled(
        attend.prefill(policy, cases.scoring("rotary"), jnp.asarray(at), implementation="xla")
    )


def one_row(group=1):
    return [x[:1] for x in cases.arrays(group, tokens=TOKENS)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("topk", "infllm", "longheads")]
)
def test_a_needle_outside_the_window_is_found(name):
    """The last query and one key far back say much to each other wherever they stand."""
    q, k, v = one_row()
    q[0, -1], k[0, 10] = 0, 0
    # The slowest pair of channels hardly turns, so the distance does not matter.
    q[0, -1, :, 3], k[0, 10, :, 3] = 30, 30
    v[0, 10] = 7
    found = np.asarray(reader(POLICIES[name], 1)(q, k, v))[0, -1]
    blind = np.asarray(reader(LMInfinite(8, 3), 1)(q, k, v))[0, -1]
    assert found.min() > 6.5
    assert blind.max() < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "other"), [(1, Window(6 + 8)), (-1, Lambda(6, sinks=8))], ids=["rise", "fall"]
)
def test_the_search_finds_the_best_where_scores_only_rise_or_fall(sign, other):
    """The last ones before the window are then the best, or the first of all."""
    q, k, v = one_row()
    q[...], k[...] = 0, 0
    q[..., 0], k[..., 0] = 1, 0.2 * sign * np.arange(TOKENS)[None, :, None]
    policy = HiP(8, window=6, sinks=0, block=1, query_block=1, query_stride=1, dense_layers=0)
    at = jnp.arange(TOKENS, dtype=jnp.int32)[None]

    @cases.compiled
    def run(*arrays):
        return [
            attend.prefill(p, cases.scoring("none"), at, implementation="xla")(*arrays)
            for p in (policy, other)
        ]

    agree(*run(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        HiP(2, window=4, sinks=0, block=1, query_block=1, query_stride=1, dense_layers=0),
        InfiniteHiP((9, 3, 1), (9, 3, 1), (1, 1, 1), window=4, sinks=0, query_block=1),
    ],
    ids=["hip", "infinite_hip"],
)
def test_a_search_finds_what_stands_among_its_like_and_may_miss_what_stands_alone(policy):
    """The half that a needle is in is known by its first key, so the needle must reach there."""
    q, k, v = one_row()
    q[0, -1], k[...] = 0, 0
    q[0, -1, :, 0] = 10
    at = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    run = cases.compiled(attend.prefill(policy, cases.scoring("none"), at))
    v[0, 9:18] = 7  # the 36 keys before the window are cut into those from 0, 9, 18 and 27 on
    k[0, 17, :, 0] = 9
    alone = np.asarray(run(q, k, v))[0, -1]
    k[0, 9:18, :, 0] = 9
    together = np.asarray(run(q, k, v))[0, -1]
    assert together.min() > 6.5
    assert alone.max() < 6.5


def test_stages_of_single_tokens_are_the_best_tokens():
    """Without positions, and with as many key heads as heads."""
    one = InfiniteHiP((1, 1), (9, 4), (1, 1), window=5, sinks=3, query_block=1)
    other, scoring = TopK(5, sinks=3, topk=4, from_layer=0), cases.scoring("none")

    @cases.compiled
    def run(*arrays):
        one_at_a_time = read(other, scoring, [1] * TOKENS)(*arrays)
        return attend.prefill(one, scoring, jnp.asarray(cases.padded(PADS, TOKENS)))(
            *arrays
        ), one_at_a_time

    agree(*run(*cases.arrays(1, tokens=TOKENS)))


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [0, 3])
def test_searching_for_every_token_does_not_depend_on_calls(ordered):
    scoring, every = cases.scoring("rotary"), ((TOKENS,), (7, 16, 1, 1, 15), (1,) * TOKENS)
    policy = InfiniteHiP(
        (8, 2), (16, 6), (1, 1), window=5, sinks=3, query_block=1, ordered_layers=ordered
    )

    @cases.compiled
    def run(*arrays):
        return [read(policy, scoring, calls)(*arrays) for calls in every]

    whole, chunks, tokens = run(*cases.arrays(3, tokens=TOKENS))
    agree(chunks, whole)
    agree(tokens, whole)


@lanes("topk")
def test_nothing_that_comes_later_is_seen(name):
    """Tokens choose together in groups of 4, and none of a group sees past itself."""
    arrays = one_row()
    before = np.asarray(reader(POLICIES[name], 1)(*arrays))
    for x in arrays:
        x[:, 32:] = np.random.default_rng(5).normal(size=x[:, 32:].shape)
    after = np.asarray(reader(POLICIES[name], 1)(*arrays))
    np.testing.assert_array_equal(before[:, :32], after[:, :32])
    assert np.abs(before[:, 32:] - after[:, 32:]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infllm", "topk", "longheads"])
def test_grouped_heads_are_repeated_heads(name):
    """Not so in HiP and InfiniteHiP, where the query heads of a key head share one search."""
    q, k, v = one_row(3)
    grouped = reader(POLICIES[name], 3)(q, k, v)
    separate = reader(POLICIES[name], 1)(q, np.repeat(k, 3, 2), np.repeat(v, 3, 2))
    agree(grouped, separate)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_heads_have_no_order(name):
    """Key heads change places, and their query heads with them: so do the outputs."""
    q, k, v = one_row(3)

    def swapped(x):
        return x.reshape(*x.shape[:2], 2, -1, WIDTH)[:, :, ::-1].reshape(x.shape)

    found = np.asarray(reader(POLICIES[name], 3)(*map(swapped, (q, k, v))))
    agree(swapped(found), np.asarray(reader(POLICIES[name], 3)(q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_larger_cache_changes_nothing(name):
    policy, scoring = POLICIES[name], cases.scoring("rotary")
    arrays = cases.arrays(3, tokens=TOKENS)

    @cases.compiled
    def run(*arrays):
        return [read(policy, scoring, CALLS[1], capacity=n)(*arrays) for n in (TOKENS, 77)]

    agree(*run(*arrays))


@lanes("infllm")
def test_one_program_decodes_at_every_length(name):
    policy, scoring = POLICIES[name], cases.scoring("rotary")
    shape = cache.CacheShape(BATCH, TOKENS, 2, 2, WIDTH, jnp.float32)
    empty = cache.create(policy, shape, layers=2)

    @cases.compiled
    def decode(held, pos, at, q, k, v):
        step, pos = attend.extend(policy, scoring, empty.layout, pos, at)
        out, held = step(q, k, v, held, jnp.int32(1))
        return out, held, pos

    q, k, v = cases.arrays(1, tokens=TOKENS)
    held, pos = empty.kv, empty.pos
    for token in range(20):
        new = [x[:, token : token + 1] for x in (q, k, v)]
        at = np.full((BATCH, 1), token, np.int32)
        out, held, pos = decode(held, pos, at, *new)
        assert np.isfinite(np.asarray(out)).all()
    assert decode._cache_size() == 1
    assert sorted(np.asarray(pos)[0]) == [-1] * 20 + list(range(20))


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("infllm:window=100,block=64", "block=64 does not divide window=100; give a divisor"),
        ("infllm:window=64,block=4,repr_topk=5", "repr_topk=5 of block=4 tokens; give 1 to 4"),
        ("infllm:window=0", "InfLLM.window is 0; give a whole number of at least 1"),
        ("topk:window=64,topk=0", "TopK.topk is 0; give a whole number of at least 1"),
        ("topk:window=64,at=-1", "TopK.at is -1; give a whole number of at least 0"),
        ("hip:topk=5", "topk=5 tokens is no whole number of blocks of block=2; give a multiple"),
        ("hip:topk=8,refresh=0", "HiP.refresh is 0; give a whole number of at least 1"),
        ("longheads:attended=100,chunk=32", "attended=100 is not three or more chunks of chunk=32"),
        ("infinite_hip:chunk=(64,8)", "chunk, topk and refresh have 2, 3 and 3 stages; give each"),
        ("infinite_hip:refresh=(4,0,4)", r"refresh is \(4, 0, 4\); give a whole number"),
        (
            "infinite_hip:topk=(32768,8000,2050)",
            "topk=2050 tokens is no whole number of chunks of chunk=8; give a multiple",
        ),
        ("infinite_hip:chunk=(256,32,12),topk=(2560,960,120)", "chunk=12 tokens does not divide"),
        ("infinite_hip:topk=(4096,8192,2048)", "topk=8192 tokens of the topk=4096 that the stage"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        parse_choice(text, POLICY_TABLE, what="policy")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_named_as_it_is_asked_for(name):
    policy = POLICIES[name]
    assert " " not in policy.name
    assert parse_choice(policy.name, POLICY_TABLE, what="policy") == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "infllm:window=64,block=64,topk=16",
            "topk=16 blocks of 64 tokens, but a text of 512 tokens holds 8; give topk<=8",
        ),
        ("topk:window=64,topk=600", "topk=600 tokens, but a text of 512 tokens has no more"),
    ],
)
def test_more_than_a_text_can_hold_is_one_sentence(text, message):
    policy = parse_choice(text, POLICY_TABLE, what="policy")
    cache.layout_for(policy, 64)  # in a text that fits the window nothing is looked up
    with pytest.raises(InputError, match=message):
        cache.layout_for(policy, 512)


def test_without_rotary_keys_cannot_be_moved():
    for encoding in ("alibi", "none"):
        with pytest.raises(InputError, match="moves keys by rotating them, but this model's"):
            check_rotary(POLICIES["infllm"], cases.ENCODINGS[encoding])
        with pytest.raises(InputError, match="moves keys by rotating them, but this model's"):
            check_rotary(POLICIES["infinite_hip"], cases.ENCODINGS[encoding])
    check_rotary(POLICIES["infllm"], cases.ENCODINGS["partial"])
    check_rotary(POLICIES["hip"], cases.ENCODINGS["none"])  # which moves none
    with pytest.raises(InputError, match="ranks keys by products alone, but this"):
        attend.prefill(POLICIES["hip"], cases.scoring("alibi"), jnp.zeros((1, 4), jnp.int32))(
            *(jnp.zeros((1, 4, 2, WIDTH)),) * 3
        )


def test_packed_rows_and_heads_of_their_own_are_refused():
    at = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(InputError, match="packed rows hold several; give each text its own row"):
        attend.prefill(POLICIES["infllm"], cases.scoring("rotary"), at, segments=at)
    mix = PerHead((Full(), POLICIES["infllm"]))
    with pytest.raises(InputError, match="chooses for all heads of a layer"):
        by_layer(mix, windows=(None,), num_kv_heads=2)


# --- What it costs --------------------------------------------------------------------------------


def test_a_stream_without_end_is_no_matter_for_a_policy_that_keeps_everything():
    assert not any(policy.bounded for policy in POLICIES.values())


@pytest.mark.parametrize("name", POLICIES)
def test_the_bytes_said_to_be_held_are_those_of_the_arrays(name):
    shape = specs.change(specs.shallow(specs.LLAMA, 2), windows=(None, None))
    layers = (POLICIES[name],) * 2
    caches = decoder.init_caches(shape, layers, batch=1, capacity=TOKENS, dtype=jnp.bfloat16)
    held = jax.tree.leaves([stored.kv for stored in caches])
    said = cost.cache_bytes(shape, layers, tokens=TOKENS, dtype=jnp.bfloat16)
    assert said == sum(x.nbytes for x in held)
    full = cost.cache_bytes(shape, (Full(),) * 2, tokens=TOKENS, dtype=jnp.bfloat16)
    assert said >= full == 2 * 2 * TOKENS * shape.num_kv_heads * shape.head_dim * 2


def test_pairs_attended_count_what_is_looked_up():
    policy = InfLLM(8, sinks=2, topk=2, block=4, repr_topk=1)
    window = cost.attended_pairs(LMInfinite(8, 2), 1000)
    assert cost.attended_pairs(policy, 1000) == cost.attended_pairs(LMInfinite(8, 2 + 8), 1000)
    assert 0 < cost.attended_pairs(policy, 1000) - window <= 8 * 1000
