"""Block-sparse attention for a TPU: numbers in the interpreter, lowering, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from tests.kernels import test_block_sparse as shared

TOKENS, WIDTH, VALUE_WIDTH, BLOCK = 300, 16, 24, 128  # three blocks, the last incomplete


def given(*, heads=2, key_heads=1, seed=0):
    return {
        "query": shared.normal(seed, 1, TOKENS, heads, WIDTH),
        "key": shared.normal(seed + 1, 1, TOKENS, key_heads, WIDTH),
        "value": shared.normal(seed + 2, 1, TOKENS, key_heads, VALUE_WIDTH),
    }


def lists(*rows):
    """Ascending lists of one head, as the operation wants them."""
    longest = max(map(len, rows))
    indices = [list(row) + [-1] * (longest - len(row)) for row in rows]
    return {
        "block_indices": jnp.asarray([[indices]], jnp.int32),
        "block_counts": jnp.asarray([[[len(row) for row in rows]]], jnp.int32),
        "block_q": BLOCK,
        "block_kv": BLOCK,
    }


def check(operands, options, dtype=np.float32, tolerance=5e-6):
    found = shared.results(operands, implementation="mosaic_tpu", dtype=dtype, **options)
    operands = {n: np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in operands.items()}
    shared.assert_close(found, shared.oracle(operands, **options), tolerance)


CASES = {
    # Clear blocks, masked ones, two heads on one key head.
    "causal": lambda: lists([0], [0, 1], [0, 2]),
    # A block of queries with an empty list, a block of keys that nobody lists, one in the future.
    "nothing listed": lambda: lists([], [1, 2], [1]) | {"logits_soft_cap": 2.0},
    "not causal": lambda: lists([1, 2], [0], [0, 1]) | {"causal": False, "scale": 0.3},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(interpreter, case):
    check(given(), CASES[case]())


@pytest.mark.slow
def test_heads_with_lists_of_their_own_on_two_cores(two_cores):
    first, second = lists([0], [0, 1], [2]), lists([0], [1], [0, 1])
    both = {
        name: jnp.concatenate([first[name], second[name]], 1)
        for name in ("block_indices", "block_counts")
    }
    check(given(key_heads=2), first | both)


@pytest.mark.slow
def test_bfloat16(interpreter):
    check(given(), CASES["causal"](), jnp.bfloat16, 1.5e-2)


@pytest.mark.slow
def test_refusals_name_the_reason():
    arrays = {name: jnp.asarray(x) for name, x in given().items()}
    for changed, word in (
        ({"scale": -1.0}, "scale=-1.0"),
        ({"config": "wide"}, "nothing to configure"),
        ({"query": arrays["query"].astype(jnp.bfloat16)}, "bfloat16"),
        ({"block_q": 100}, "block_q=100"),
    ):
        with pytest.raises(ExceptionGroup) as refusal:
            kernels.block_sparse_attention(
                **(arrays | CASES["causal"]() | changed), implementation="mosaic_tpu"
            )
        assert word in str(refusal.value.exceptions[0])
