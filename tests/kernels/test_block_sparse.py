"""Block-sparse attention against its dense definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.block_sparse import lists

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
    "one list": lambda: drawn(1),
    "not causal": lambda: drawn(1) | {"causal": False, "scale": 0.3},
    "everything": everything,
}


@pytest.mark.parametrize("case", list(CASES)[:1])
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
    options = CASES["everything"]()
    found = results(given, implementation="xla_chunked", dtype=dtype, **options)
    exact = {name: np.asarray(x, np.float64) for name, x in given.items()}
    assert_close(found, oracle(exact, **options), tolerance)


def test_all_blocks_listed_is_lambda_attention():
    """Without a cap, complete lists are causal attention."""

    def both(given):
        listed = kernels.block_sparse_attention(
            **given, **everything(), block_q=BLOCK_Q, block_kv=BLOCK_KV
        )
        return listed, kernels.lambda_attention(**given, window_size=TOKENS, num_global=0)

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


BAD = [
    ({"block_q": 0}, "block_q"),
    ({"block_indices": jnp.zeros((BATCH, 3, 6, 4), jnp.int32)}, "block_indices has shape"),
    ({"block_counts": jnp.zeros((BATCH, 1, 5), jnp.int32)}, "block_counts has shape"),
    ({"block_counts": jnp.full((BATCH, 1, 6), 5)}, "block_counts runs to 5"),
    ({"block_indices": everything()["block_indices"] + 1}, "block_indices holds 4"),
    ({"block_indices": jnp.zeros((BATCH, 1, 6, 4), jnp.int32)}, "ascend"),
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
