"""The methods against outputs of their released implementations: ../shared/cases/originals.

q, k and v there are un-rotated, of one row; rotary base 10,000 over all 16 channels, half layout.
Where a release and ours depart, the rows that do are named, and the release's rule in
tests.attention.sparse_oracle gives its numbers: so that rule is the whole of the departure.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lminf
from lminf.attention import attend, cache, rope, scores
from lminf.attention.policies.eviction import H2O
from lminf.attention.policies.hip import HiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.longheads import LongHeads
from lminf.attention.policies.prompt_compression import SnapKV
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import LMInfinite, SelfExtend
from tests import cases as shared
from tests.attention import cases, sparse_oracle, test_eviction

ATOL = 1e-5
SCORING = scores.ScoreConfig(rope.Rotary(10_000.0, 16, "half"), 16**-0.5, None)


@functools.cache
def released(name: str) -> dict[str, np.ndarray]:
    with np.load(shared.path(f"originals/{name}.npz")) as arrays:
        return dict(arrays)


def read(policy, case, sizes, **options) -> np.ndarray:
    """[T, N, H], by the functions that a model of one's own calls."""

    @cases.compiled
    def run(*arrays):
        if len(sizes) == 1:
            return lminf.attend(*arrays, policy, **options)
        return lminf.attend_stepwise(*arrays, policy, chunks=sizes, **options)

    return np.asarray(run(case["q"], case["k"], case["v"]))[0]


def by_formula(oracle, policy, case, sizes, **rule) -> np.ndarray:
    text = [case[name][0].astype(np.float64) for name in ("q", "k", "v")]
    return oracle(policy, SCORING, *text, sizes, **rule)


def departing(found, out) -> list[int]:
    """The rows that are not equal to 1e-5."""
    return np.flatnonzero(np.abs(found - out).max((1, 2)) > ATOL).tolist()


def test_self_extend_is_its_release():
    case = released("5_self_extend")
    policy = SelfExtend(int(case["window"]), int(case["group"]))
    assert departing(read(policy, case, [64]), case["out"][0]) == []
    assert departing(read(policy, case, [1] * 64), case["dec"][0]) == []


def test_infllm_that_writes_is_its_release():
    case = released("6b_infllm_decode")
    fields = ("window", "sinks", "topk", "block", "repr_topk", "exec_block")
    policy = InfLLM(**{name: int(case[name]) for name in fields})
    assert departing(read(policy, case, case["sizes"].tolist()), case["out"][0]) == []


def test_snapkv_is_its_release():
    case = released("7_snapkv")
    prompt, (_, tokens, heads, width) = int(case["prompt"]), case["q"].shape
    policy = SnapKV(int(case["capacity"]), int(case["window"]), int(case["pooling"]))
    at = jnp.arange(tokens, dtype=jnp.int32)[None]

    @cases.compiled
    def run(q, k, v):
        shape = cache.CacheShape(1, tokens, heads, heads, width, k.dtype)
        empty = cache.create(policy, shape, layers=1)
        step, pos = attend.extend(policy, SCORING, empty.layout, empty.pos, at[:, :prompt])
        first, held = step(q[:, :prompt], k[:, :prompt], v[:, :prompt], empty.kv, 0)
        stored = empty.updated(held, pos)
        stored = policy.compress_prompt(SCORING, stored, length=prompt, room=tokens - prompt)
        step, _ = attend.extend(policy, SCORING, stored.layout, stored.pos, at[:, prompt:])
        after, _ = step(q[:, prompt:], k[:, prompt:], v[:, prompt:], stored.kv, 0)
        return jnp.concatenate([first, after], 1), stored.state["pos"][0]

    out, older = run(case["q"], case["k"], case["v"])
    assert departing(np.asarray(out)[0], case["out"][0]) == []
    sizes = [prompt, *[1] * (tokens - prompt)]
    assert departing(read(policy, case, sizes, prompt=prompt), case["out"][0]) == []
    recent = np.arange(prompt - policy.window, prompt)
    kept = [np.concatenate([of_head, recent]) for of_head in np.asarray(older)[0].T]
    np.testing.assert_array_equal(kept, case["kept"])


@pytest.mark.slow
def test_longheads_departs_from_its_release_in_the_last_token_of_a_chunk():
    """There the release counts the chunk that this token completes as the one before it, so the
    one that was is ranked among the others, and one chunk less is seen.
    """
    case = released("9_longheads")
    policy, prompt = LongHeads(int(case["attended"]), int(case["chunk"])), int(case["prompt"])
    sizes = [prompt, *[1] * (case["q"].shape[1] - prompt)]
    last = [i for i in range(prompt, 96) if i % policy.chunk == policy.chunk - 1]
    assert departing(read(policy, case, sizes), case["out"][0]) == last
    theirs = by_formula(sparse_oracle.long_heads, policy, case, sizes, ranked=lambda i: i in last)
    assert departing(theirs, case["out"][0]) == []


def test_h2o_is_its_release():
    case = released("11_h2o")
    heavy, recent = int(case["hh"]), int(case["recent"])
    policy = H2O(heavy + recent + 1, recent=recent, turn=1)
    assert policy == H2O(heavy + recent + 1, turn=1)  # which halves what is kept, as released
    tokens = case["q"].shape[1]
    assert departing(read(policy, case, [1] * tokens), case["out"][0]) == []
    kept: list = []
    arrays = (case[name] for name in ("q", "k", "v"))
    test_eviction.simulate(policy, SCORING, *arrays, (0,), kept)
    for of_heads, theirs in zip(kept, case["kept"], strict=True):
        np.testing.assert_array_equal(of_heads, theirs[:, : len(of_heads[0])])


@pytest.mark.slow
@pytest.mark.parametrize("first_row", [0, 1])
def test_the_search_of_hip_is_its_release(first_row):
    """Outputs are of the rows 0, 2 of every block, which the release can be given. Left alone it
    asks 1, 3: so does ours.
    """
    case = released("13_hip")
    fields = ("topk", "window", "sinks", "block", "query_block")
    policy = HiP(**{name: int(case[name]) for name in fields}, query_stride=2, dense_layers=0)
    tokens = case["q"].shape[1]
    formula = by_formula(sparse_oracle.hip, policy, case, [tokens], first_row=first_row)
    out = case["out"][0] if first_row == 0 else read(policy, case, [tokens])
    assert departing(formula, out) == []


@pytest.mark.slow
def test_top_k_departs_from_its_release_where_fewer_than_k_are_there():
    """3 middle tokens and k = 5: the release takes none of them, and we take all."""
    case = released("14_topk_fewer_than_k")
    window, sinks, topk = (int(case[name]) for name in ("window", "sinks", "topk"))
    policy = TopK(window, sinks, topk, at=int(case["at"]), from_layer=0)
    tokens = case["q"].shape[1]
    assert departing(read(LMInfinite(window, sinks), case, [tokens]), case["out"][0]) == []
    found = read(policy, case, [tokens])
    assert departing(found, case["out"][0]) == [tokens - 1]
    assert departing(by_formula(sparse_oracle.top_k, policy, case, [tokens]), found) == []
