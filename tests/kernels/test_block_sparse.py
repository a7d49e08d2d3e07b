"""Block-sparse attention against its dense definition, and the choice of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels import SegmentIds
from lminf.kernels.block_sparse import lists, select

BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 45, 6, 2, 16, 24
BLOCK_Q, BLOCK_KV = 8, 12  # 6 blocks of queries, 4 of keys, neither whole


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drawn(list_heads, *, q_blocks=6, kv_blocks=4, seed=0):
    """Random ascending lists, some of them empty."""
    rng = np.random.default_rng(seed)
    indices = np.full((BATCH, list_heads, q_blocks, kv_blocks), -1, np.int32)
    counts = rng.integers(0, kv_blocks + 1, indices.shape[:3]).astype(np.int32)
    for at in np.ndindex(*counts.shape):
        indices[at][: counts[at]] = np.sort(rng.permutation(kv_blocks)[: counts[at]])
    return {"block_indices": jnp.asarray(indices), "block_counts": jnp.asarray(counts)}


def everything():
    """Lists that name every block."""
    indices = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (BATCH, 1, 6, 4))
    return {"block_indices": indices, "block_counts": jnp.full((BATCH, 1, 6), 4, jnp.int32)}


def packed():
    ids = np.zeros((BATCH, TOKENS), np.int32)
    ids[0, 5:23], ids[0, 23:40], ids[0, 40:] = 1, 2, -1
    ids[1, :9], ids[1, 30:] = -1, 3
    return SegmentIds(jnp.asarray(ids), jnp.asarray(ids))


def operands(heads=HEADS):
    return {
        "query": normal(0, BATCH, TOKENS, heads, WIDTH),
        "key": normal(1, BATCH, TOKENS, KEY_HEADS, WIDTH),
        "value": normal(2, BATCH, TOKENS, KEY_HEADS, VALUE_WIDTH),
    }


def results(given, *, implementation, dtype=np.float32, **options):
    """Output, LSE and gradients with respect to every operand, as numpy float64."""
    given = {name: jnp.asarray(x, dtype) for name, x in given.items()}
    statistics = jnp.float64 if dtype == np.float64 else jnp.float32

    def loss(given):
        out, lse = kernels.block_sparse_attention(
            **given, **({"block_q": BLOCK_Q, "block_kv": BLOCK_KV} | options),
            return_residuals=True, implementation=implementation,
        )  # fmt: skip
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        d_out = jnp.asarray(normal(7, *out.shape), statistics)
        d_lse = jnp.asarray(normal(8, *lse.shape), statistics)
        return (out.astype(statistics) * d_out).sum() + (seen * d_lse).sum(), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(given)
    found = {"out": out, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def assert_close(found, expected, tolerance=5e-6):
    for name, right in expected.items():
        np.testing.assert_array_equal(np.isneginf(found[name]), np.isneginf(right), name)
        left, right = (np.where(np.isneginf(x), 0, x) for x in (found[name], right))
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-3)
        assert error <= tolerance, (name, error)


def oracle(given, **options):
    with jax.enable_x64(True):
        return results(given, implementation="reference", dtype=np.float64, **options)


CASES = {
    "a list for each head": lambda: drawn(KEY_HEADS) | {"logits_soft_cap": 2.0},
    "one list, segments, window, globals": lambda: (
        drawn(1) | {"segment_ids": packed(), "window_size": 9, "num_global": 3}
    ),
    "not causal": lambda: drawn(1) | {"causal": False, "scale": 0.3},
    "window": lambda: everything() | {"window_size": 7, "num_global": 2},
}


@pytest.mark.parametrize("case", list(CASES)[1:2])
def test_values_and_gradients(case):
    options = CASES[case]()
    found = results(operands(), implementation="xla_chunked", **options)
    assert_close(found, oracle(operands(), **options))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_groups(case, group):
    options, given = CASES[case](), operands(KEY_HEADS * group)
    found = results(given, implementation="xla_chunked", **options)
    assert_close(found, oracle(given, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1.5e-2), (jnp.float16, 2e-3)])
def test_low_precision(dtype, tolerance):
    given = {name: jnp.asarray(x, dtype) for name, x in operands().items()}
    options = CASES["window"]()
    found = results(given, implementation="xla_chunked", dtype=dtype, **options)
    exact = {name: np.asarray(x, np.float64) for name, x in given.items()}
    assert_close(found, oracle(exact, **options), tolerance)


def test_all_blocks_listed_is_lambda_attention():
    """Without a cap, window and globals over complete lists are the Λ shape."""

    def both(given):
        listed = kernels.block_sparse_attention(
            **given, **everything(), block_q=BLOCK_Q, block_kv=BLOCK_KV, window_size=7, num_global=2
        )
        return listed, kernels.lambda_attention(**given, window_size=7, num_global=2)

    found, expected = jax.jit(both)({name: jnp.asarray(x) for name, x in operands().items()})
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_transposed_lists_hold_the_same_pairs():
    given = drawn(KEY_HEADS, seed=3)
    found = jax.jit(lambda given: lists.transpose(given, 4))(lists.Lists(*given.values()))
    indices, counts = (np.asarray(x) for x in given.values())
    for b, k in np.ndindex(BATCH, KEY_HEADS):
        for kv in range(4):
            start, end = np.asarray(found.starts)[b, k, kv : kv + 2]
            expected = [q for q in range(6) if kv in indices[b, k, q, : counts[b, k, q]]]
            assert np.asarray(found.queries)[b, k, start:end].tolist() == expected


def test_chosen_blocks():
    """Forced blocks first, then the best; ties to the lower index; nothing in the future."""
    scored = np.zeros((1, 1, 6, 4), np.float32)
    scored[0, 0, 5, 1], scored[0, 0, 4, 3] = 1.0, 9.0
    options = {"block_q": BLOCK_Q, "block_kv": BLOCK_KV, "global_blocks": 1, "local_blocks": 1}
    found = jax.jit(lambda x: select.choose(x, 3, **options))(scored)
    assert found.indices[0, 0].tolist() == [
        [0, -1, -1],  # rows 0-7: only block 0 has begun
        [0, 1, -1],
        [0, 1, -1],
        [0, 1, 2],
        [0, 1, 3],  # rows 32-39: own is 3; 1 and 2 tie
        [0, 1, 3],  # 1 scores best
    ]
    assert found.counts[0, 0].tolist() == [1, 2, 2, 3, 3, 3]


def test_the_block_that_answers_is_chosen():
    """A key that points where the queries point, in an otherwise quiet text."""
    key = 0.01 * normal(1, 1, 48, 1, WIDTH)
    query = 0.01 * normal(0, 1, 48, 2, WIDTH)
    key[0, 17], query[0, 40:] = 1.0, 1.0

    def chosen(query, key):
        for kind, count in (("mean", 1), ("max_norm", 1), ("top_k", 3)):
            scored = select.scores(query, key, block_q=8, block_kv=8, kind=kind, count=count)
            yield select.choose(scored, 2, block_q=8, block_kv=8).indices[0, 0, 5]

    for found in jax.jit(lambda *given: list(chosen(*given)))(query, key):
        assert found.tolist() == [2, 5]


BAD = [
    ({"block_q": 0}, "block_q"),
    ({"block_indices": jnp.zeros((BATCH, 3, 6, 4), jnp.int32)}, "block_indices has shape"),
    ({"block_counts": jnp.zeros((BATCH, 1, 5), jnp.int32)}, "block_counts has shape"),
    ({"block_counts": jnp.full((BATCH, 1, 6), 5)}, "block_counts runs to 5"),
    ({"block_indices": everything()["block_indices"] + 1}, "block_indices holds 4"),
    ({"block_indices": jnp.zeros((BATCH, 1, 6, 4), jnp.int32)}, "ascend"),
    ({"num_global": 3}, "num_global=3 needs window_size"),
    ({"window_size": 0}, "window_size"),
    ({"window_size": 3, "causal": False}, "needs causal"),
    ({"key": jnp.zeros((BATCH, TOKENS, 4, WIDTH))}, "value has shape"),
]


@pytest.mark.parametrize(("change", "word"), BAD)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(change, word):
    given = {name: jnp.asarray(x) for name, x in operands().items()} | everything()
    with pytest.raises(ValueError, match=word):
        kernels.block_sparse_attention(
            **(given | {"block_q": BLOCK_Q, "block_kv": BLOCK_KV} | change)
        )
