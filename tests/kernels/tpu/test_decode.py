"""Λ-decoding for a TPU: its numbers in the interpreter at every state of the ring, its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels import RollingCache
from lminf.kernels.decode.mosaic_tpu import Config
from tests.kernels import test_decode as shared

SMALL = Config(block=8)


def step(lengths, *, num_global, window, key_heads=2, sinks=False):
    """Queries and a cache whose slots all hold something, also those that nobody may see."""
    batch = len(lengths)
    cache = RollingCache(
        shared.normal(0, batch, key_heads, num_global, 8),
        shared.normal(1, batch, key_heads, num_global, 12),
        shared.normal(2, batch, key_heads, window, 8),
        shared.normal(3, batch, key_heads, window, 12),
        jnp.asarray(lengths, jnp.int32),
    )
    return {
        "query": shared.normal(4, batch, 6, 8),
        "query_global": shared.normal(5, batch, 6, 8),
        "sinks": shared.normal(6, 6) if sinks else None,
        "cache": cache,
    }


def check(given, config=SMALL, **options):
    decode = functools.partial(kernels.lambda_decode, **given, return_residuals=True, **options)
    found = decode(implementation="mosaic_tpu", config=config)
    shared.assert_close(found, decode(implementation="reference"))


@pytest.mark.slow
def test_values(interpreter):
    """Nothing read, a ring half full, one that is full with some globals beyond it."""
    check(step([0, 9, 15], num_global=3, window=13, sinks=True))


@pytest.mark.slow
@pytest.mark.parametrize("key_heads", [1, 3, 6])
@pytest.mark.parametrize(("num_global", "window"), [(0, 16), (11, 5), (8, 24), (3, 1)])
def test_sizes(interpreter, key_heads, num_global, window):
    lengths = [1, window, window + 2, 300]
    check(step(lengths, num_global=num_global, window=window, key_heads=key_heads))


@pytest.mark.slow
def test_soft_cap_and_one_block_on_two_cores(two_cores):
    given = step([4, 40], num_global=5, window=21)
    check(given, None, logits_soft_cap=2.0, scale=0.7)


def stacked(given, layer, **options):
    """The step's cache as one of three layers, the others NaN."""

    def put(x):
        other = jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 10**6)
        return jnp.stack([x if at == layer else other for at in range(3)])

    cache = RollingCache(*map(put, given["cache"]))
    return given | {"cache": cache, "layer": jnp.int32(layer)} | options


@pytest.mark.slow
def test_a_layer_of_a_stack_and_counts_of_globals(interpreter):
    given = step([30, 45], num_global=19, window=13, sinks=True)
    given = stacked(given, 1, global_count=jnp.array([[12, 0], [30, 5]]))
    check(given)


@pytest.mark.slow
def test_globals_without_a_ring(interpreter):
    check(step([30, 0], num_global=19, window=0) | {"global_count": jnp.array([17, 8])})


@pytest.mark.slow
def test_gradients(interpreter):
    given = step([9, 30], num_global=3, window=13, sinks=True)
    lengths = given["cache"].length

    def grads(implementation, config):
        def loss(given):
            cache = given["cache"]._replace(length=lengths)
            out, lse = kernels.lambda_decode(
                **(given | {"cache": cache}), return_residuals=True,
                implementation=implementation, config=config,
            )  # fmt: skip
            return (out**2).sum() + lse.sum()

        floats = given | {"cache": given["cache"]._replace(length=None)}
        return jax.jit(jax.grad(loss))(floats)

    found, right = grads("mosaic_tpu", SMALL), grads("reference", None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, right)


def test_lowers_for_a_tpu_without_one():
    cache = jax.eval_shape(lambda: step([1], num_global=100, window=4096)["cache"])
    query = jax.ShapeDtypeStruct((1, 6, 8), jnp.float32)
    decode = functools.partial(kernels.lambda_decode, implementation="mosaic_tpu")
    text = jax.jit(decode).trace(query, cache).lower(lowering_platforms=("tpu",)).as_text()
    assert "lambda_decode" in text


def test_refusals_name_the_reason():
    given = step([1], num_global=2, window=8)
    for changed, word in (
        ({"query": given["query"].astype(jnp.bfloat16)}, "bfloat16"),
        ({"config": "wide"}, "config is a"),
        ({"alibi_slopes": jnp.ones(6)}, "ALiBi"),
        ({"head_window": (3, 8)}, "head_window"),
    ):
        with pytest.raises(ExceptionGroup) as refusal:
            kernels.lambda_decode(**(given | changed), implementation="mosaic_tpu")
        assert word in str(refusal.value.exceptions[0])
