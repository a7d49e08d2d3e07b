"""Evicting by score: token by token in NumPy float64, and the identities that follow."""

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import cache
from lminf.attention.policies.eviction import H2O, TOVA, EvictionPolicy, SirLLM
from lminf.attention.policy import Full, Streaming
from lminf.errors import InputError
from lminf.models.layer_policies import chunk_within, common_eviction
from tests.attention import cases, oracle
from tests.attention.cases import ATOL, TOKENS

PADS = (0, 3)  # padding of whole chunks, as prompts of unequal length are laid out


def simulate(policy: EvictionPolicy, scoring, q, k, v, pads, kept=None):
    """[B, T, N, H]: every head a list of what it holds, in the order of the text. To `kept` goes
    what the heads would hold after each token, were it the last of its turn.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        held = [[] for _ in range(kv_heads)]  # of columns
        scores = np.zeros((kv_heads, tokens))
        for t in range(pads[b], tokens):
            if (t - pads[b]) % policy.turn == 0:
                held = [evict(policy, held[h], scores[h]) for h in range(kv_heads)]
            weights = np.zeros((kv_heads, group, tokens))
            for h in range(kv_heads):
                held[h] = [*held[h], t]
                places = np.arange(len(held[h]))
                for g in range(group):
                    n = h * group + g
                    w = attention(scoring, q[b, t, n], k[b, held[h], h], places, n, heads)
                    out[b, t, n] = w @ v[b, held[h], h]
                    weights[h, g, held[h]] = w
            if isinstance(policy, H2O):
                scores += weights.sum(1)
            elif isinstance(policy, TOVA):
                scores[:] = weights.mean((0, 1))
            if kept is not None:
                kept.append([evict(policy, held[h], scores[h]) for h in range(kv_heads)])
    return out


def evict(policy, held, scores):
    """SirLLM's rule: sinks and the best (of equals the oldest), then the most recent others.

    H2O's: exactly the last `recent`, and the best of those before them.
    """
    candidates = held
    if isinstance(policy, H2O):
        candidates = held[policy.sinks : max(len(held) - policy.recent, 0)]
    best = sorted(candidates, key=lambda t: (-np.round(scores[t], 9), t))[: policy.best]
    chosen = set(held[: policy.sinks]) | set(best)
    for t in reversed(held):
        if len(chosen) < policy.capacity - policy.turn:
            chosen.add(t)
    return sorted(chosen)


def attention(scoring, q, k, places, head, heads):
    distance = places[-1] - places
    products = oracle._products(scoring.encoding, q[None, None], k[None], distance[None, None])
    scores = products[0, 0] * scoring.scale
    if type(scoring.encoding).__name__ == "Alibi":
        slope = oracle.alibi_slope(head, heads, scoring.encoding.max_bias)
        scores = scores - slope * distance
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def read(policy, scoring, sizes, arrays, pads=PADS):
    at = cases.padded(pads)
    run = cases.chunks(policy, scoring, at, sizes, implementation=None)
    return np.asarray(cases.compiled(lambda *x: run(*x)[0])(*arrays)), at >= 0


@pytest.mark.parametrize(
    ("policy", "encoding"),
    [
        (H2O(10, sinks=2, recent=2, turn=3), "rotary"),
        pytest.param(TOVA(9, sinks=0, recent=2, turn=3), "alibi", marks=pytest.mark.slow),
        pytest.param(H2O(9, sinks=1, recent=0, turn=3), "alibi", marks=pytest.mark.slow),
        pytest.param(TOVA(8, sinks=1, turn=3), "partial", marks=pytest.mark.slow),
        pytest.param(SirLLM(10, sinks=2, recent=1, turn=3), "none", marks=pytest.mark.slow),
    ],
)
def test_in_any_chunks_within_a_turn_it_is_the_lists_of_each_head(policy, encoding):
    scoring, arrays = cases.scoring(encoding), cases.arrays(2)
    expected = simulate(policy, scoring, *arrays, PADS)
    for sizes in ([policy.turn] * (TOKENS // policy.turn), [1] * TOKENS):
        found, real = read(policy, scoring, sizes, arrays)
        np.testing.assert_allclose(found[real], expected[real], atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [H2O, TOVA, SirLLM])
def test_with_a_place_for_every_token_it_is_full_attention(kind):
    scoring, arrays = cases.scoring("rotary"), cases.arrays(1)
    full = cases.compiled(cases.reference(Full(), scoring, cases.padded(PADS)))(*arrays)
    found, real = read(kind(TOKENS, sinks=2, turn=4), scoring, [1] * TOKENS, arrays)
    np.testing.assert_allclose(found[real], np.asarray(full)[real], atol=ATOL)


@pytest.mark.parametrize("kind", [H2O, pytest.param(SirLLM, marks=pytest.mark.slow)])
def test_with_no_token_kept_for_its_score_it_is_streaming(kind):
    """A capacity of sinks, recent tokens and the turn; a turn of one is StreamingLLM's."""
    scoring, arrays = cases.scoring("rotary"), cases.arrays(1)
    streaming = cases.reference(Streaming(window=6, sinks=3), scoring, cases.padded(PADS))
    expected = np.asarray(cases.compiled(streaming)(*arrays))
    policy = kind(9, sinks=3, recent=5, turn=1)
    found, real = read(policy, scoring, [1] * TOKENS, arrays)
    np.testing.assert_allclose(found[real], expected[real], atol=ATOL)


def kept(policy, score):
    """Which of so many tokens in order a turn keeps, as their numbers; then in any slots."""
    score = np.asarray(score, np.float32)
    place = np.arange(len(score), dtype=np.int32)
    stays = []
    for order in (place, np.random.default_rng(0).permutation(place).astype(np.int32)):
        pos, scores = (jnp.asarray(x)[None, :, None] for x in (order, score[order]))
        state = {"pos": pos, "score": scores}
        new = np.asarray(policy.evict(state, None)["pos"])[0, :, 0]
        held = order[new >= 0]
        stays.append(held[np.argsort(new[new >= 0])].tolist())
    assert stays[0] == stays[1]
    return stays[0]


def test_what_a_turn_keeps():
    """14 tokens are held, and a turn of 4 needs room: 10 stay, the 5 best among them."""
    policy = TOVA(14, sinks=2, recent=3, turn=4)
    assert policy.best == 5
    constant = np.zeros(14)
    # Of equals the oldest, sinks among them; then the most recent.
    assert kept(policy, constant) == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    late = constant + (np.arange(14) >= 9)
    assert kept(policy, late) == [0, 1, 6, 7, 8, 9, 10, 11, 12, 13]
    one = constant + (np.arange(14) == 6) - (np.arange(14) < 2)  # the sinks are the worst
    assert kept(policy, one) == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13]


def test_h2o_keeps_the_best_of_what_is_not_recent_and_by_default_as_many_recent_ones():
    policy, late = H2O(14, sinks=2, recent=3, turn=4), np.zeros(14) + (np.arange(14) >= 9)
    assert kept(policy, np.zeros(14)) == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13]
    assert kept(policy, late) == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    assert kept(policy, 1 - late) == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13]
    assert H2O(512) == H2O(512, sinks=0, recent=192, turn=128)  # the other 192 by score


def test_the_first_token_of_a_turn_is_as_surprising_as_any_of_it_and_surprise_decays():
    policy = SirLLM(14, sinks=2, turn=4, decay=0.5)
    score = np.array([8, 0, 1, 9, 3, 2], np.float32)[None, :, None]
    place = np.array([5, 4, 3, 0, 6, 7], np.int32)[None, :, None]
    found = policy.end_of_turn(score, jnp.asarray(place), jnp.full((1, 1, 1), 4))
    np.testing.assert_array_equal(found[0, :, 0], [4, 4, 0.5, 4.5, 1.5, 1])


def test_cache_bytes_are_those_of_the_capacity_however_long_the_text():
    shape = cache.CacheShape(2, 10**9, 4, 2, 8, jnp.float32)
    held = cache.create(H2O(12, turn=4), shape, layers=3)
    assert held.k.nbytes + held.v.nbytes == 3 * 2 * 12 * 2 * 8 * 4 * 2
    assert sum(x.nbytes for x in held.state.values()) == 3 * 2 * 12 * 2 * (4 + 4)


def test_chunks_end_where_turns_do():
    turns = [Full(), H2O(100, turn=24), TOVA(100, turn=36)]
    assert common_eviction(turns) == 12
    assert common_eviction([Full(), Streaming(4, 1)]) is None
    assert [chunk_within(12, chunk) for chunk in (16, 12, 8)] == [12, 12, 4]
    assert chunk_within(None, 16) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(10, sinks=4, recent=4, turn=4), "capacity=10 is less than .* capacity>=12"),
        (lambda: TOVA(10, turn=0), "TOVA.turn is 0; give a whole number of at least 1"),
        (lambda: SirLLM(300, decay=1.5), r"SirLLM.decay is 1.5; give a finite number above 0"),
        (lambda: SirLLM(300, score="paper"), "score='paper'; give 'surprise' or 'reference'"),  # pyright: ignore[reportArgumentType] (that is the error)
    ],
)
def test_bad_settings_are_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_more_than_a_turn_at_once_is_refused():
    with pytest.raises(InputError, match="evicts before every 4 tokens, but 24 are to be read at"):
        read(H2O(12, sinks=1, turn=4), cases.scoring("none"), [TOKENS], cases.arrays(1))
