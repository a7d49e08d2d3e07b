"""Decoding one token at a time equals rows of lambda_attention, before and after the ring wraps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.decode import cache as caches

BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 29, 6, 2, 8, 12
TOLERANCE = 2e-6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def text(heads=HEADS, key_heads=KEY_HEADS):
    return {
        "query": normal(0, BATCH, TOKENS, heads, WIDTH),
        "query_global": normal(1, BATCH, TOKENS, heads, WIDTH),
        "key": normal(2, BATCH, TOKENS, key_heads, WIDTH),
        "key_global": normal(3, BATCH, TOKENS, key_heads, WIDTH),
        "value": normal(4, BATCH, TOKENS, key_heads, VALUE_WIDTH),
    }


def whole(given, num_global, window, **options):
    """What lambda_attention makes of the text: outputs [B, T, N, Hv] and LSE [B, T, N]."""

    def attend(given):
        given = given | {"key_global": given["key_global"][:, :num_global]}
        out, lse = kernels.lambda_attention(
            **given, value_global=given["value"][:, :num_global],
            num_global=num_global, window_size=window,
            implementation="reference", return_residuals=True, **options,
        )  # fmt: skip
        return out, lse.swapaxes(1, 2)

    return jax.jit(attend)(given)


def fresh(num_global, window, key_heads=KEY_HEADS, dtype=jnp.float32):
    return caches.empty(
        BATCH, key_heads, WIDTH,
        num_global=num_global, window_size=window, value_width=VALUE_WIDTH, dtype=dtype,
    )  # fmt: skip


def step_by_step(given, cache, implementation, **options):
    """The same through the cache, token by token, inside one scan."""

    def step(cache, token):
        one = {name: x[:, None] for name, x in token.items()}
        cache = caches.append(cache, one["key"], one["value"], key_global=one["key_global"])
        found = kernels.lambda_decode(
            token["query"], cache, query_global=token["query_global"],
            implementation=implementation, return_residuals=True, **options,
        )  # fmt: skip
        return cache, found

    def steps(given, cache):
        _, found = jax.lax.scan(step, cache, {n: x.swapaxes(0, 1) for n, x in given.items()})
        return tuple(x.swapaxes(0, 1) for x in found)

    return jax.jit(steps)(given, cache)


def assert_close(found, expected, tolerance=TOLERANCE):
    for left, right in zip(found, expected, strict=True):
        left, right = (np.asarray(x, np.float64) for x in (left, right))
        np.testing.assert_array_equal(np.isneginf(left), np.isneginf(right))
        left, right = (np.where(np.isneginf(x), 0, x) for x in (left, right))
        assert np.linalg.norm(left - right) <= tolerance * np.linalg.norm(right)


def same_rows(num_global, window, implementation, heads=HEADS, key_heads=KEY_HEADS, **options):
    given = text(heads, key_heads)
    found = step_by_step(given, fresh(num_global, window, key_heads), implementation, **options)
    assert_close(found, whole(given, num_global, window, **options))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_row_across_the_wrap(implementation):
    options = {"sinks": normal(5, HEADS), "logits_soft_cap": 2.0, "scale": 0.3}
    same_rows(3, 7, implementation, **options)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("num_global", "window"), [(0, 5), (5, 1), (9, 4), (4, 29), (2, 64)])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_odd_sizes(implementation, num_global, window, group):
    same_rows(num_global, window, implementation, heads=2 * group)


def test_a_prefill_of_uneven_rows_leaves_the_same_cache():
    """9 and 17 tokens in one call, then 3 more each, equal the tokens one at a time."""
    given, lengths = text(), jnp.array([9, 17])

    def step(t, cache):
        key, value, key_global = (
            jax.lax.dynamic_slice_in_dim(given[name], t, 1, 1)
            for name in ("key", "value", "key_global")
        )
        count = (t < lengths + 3).astype(jnp.int32)
        return caches.append(cache, key, value, key_global=key_global, count=count)

    one = jax.jit(lambda cache: jax.lax.fori_loop(0, 20, step, cache))(fresh(3, 7))
    append = jax.jit(caches.append)
    chunk = append(
        fresh(3, 7), given["key"], given["value"], key_global=given["key_global"], count=lengths
    )
    rest = {n: np.stack([x[0, 9:12], x[1, 17:20]]) for n, x in as_numpy(given).items()}
    chunk = append(chunk, rest["key"], rest["value"], key_global=rest["key_global"])
    for left, right in zip(chunk, one, strict=True):
        np.testing.assert_array_equal(left, right)
    last = (np.arange(BATCH), np.asarray(chunk.length) - 1)
    queries = [as_numpy(given)[name][last] for name in ("query", "query_global")]
    found = jax.jit(lambda near, far: kernels.lambda_decode(near, chunk, query_global=far))
    expected = np.asarray(whole(given, 3, 7)[0])[last]
    assert_close([found(*queries)], [expected])


def as_numpy(given):
    return {name: np.asarray(x) for name, x in given.items()}


def test_nothing_read_is_zero_and_minus_infinity():
    for implementation in ("reference", "xla"):
        decode = functools.partial(
            kernels.lambda_decode, implementation=implementation, return_residuals=True
        )
        out, lse = jax.jit(decode)(
            normal(0, BATCH, HEADS, WIDTH), fresh(3, 7), sinks=normal(1, HEADS)
        )
        assert not np.asarray(out).any()
        assert np.isneginf(np.asarray(lse)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1e-3)])
def test_low_precision(dtype, tolerance):
    given = {name: x.astype(dtype) for name, x in text().items()}
    found = step_by_step(given, fresh(3, 7, dtype=dtype), "xla")
    exact = whole({name: x.astype(jnp.float32) for name, x in given.items()}, 3, 7)
    assert_close(found, exact, tolerance)


@pytest.mark.slow
def test_gradients():
    given = text()
    cache = caches.append(fresh(3, 7), given["key"], given["value"])
    sinks = normal(5, HEADS)

    def loss(implementation, query, cache_arrays, sinks):
        out, lse = kernels.lambda_decode(
            query, kernels.RollingCache(*cache_arrays, cache.length), sinks=sinks,
            implementation=implementation, return_residuals=True,
        )  # fmt: skip
        return (out * normal(8, *out.shape)).sum() + lse.sum()

    given = (given["query"][:, -1], tuple(cache[:4]), sinks)
    grads = [
        jax.tree.leaves(jax.grad(functools.partial(loss, name), (0, 1, 2))(*given))
        for name in ("xla", "reference")
    ]
    assert_close(*grads, 5e-6)


def test_the_cost_of_a_step_does_not_depend_on_the_length():
    """One compiled program, whose arrays are the g + w slots, whatever has been read."""
    cache = fresh(3, 7)
    step = jax.jit(kernels.lambda_decode)
    step(normal(0, BATCH, HEADS, WIDTH), cache)
    step(
        normal(0, BATCH, HEADS, WIDTH), cache._replace(length=jnp.array([8192, 131072], jnp.int32))
    )
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"query": jnp.zeros((BATCH, 5, WIDTH))}, "query has 5 heads"),
        ({"query": jnp.zeros((BATCH, HEADS, 4))}, "cache.k_ring"),
        ({"query_global": jnp.zeros((BATCH, 4, WIDTH))}, "query_global"),
        ({"sinks": jnp.zeros(5)}, "sinks"),
        ({"implementation": "cuda"}, "implementation"),
        ({"cache": fresh(3, 7)._replace(v_global=jnp.zeros((1, 1, 1, 1)))}, "cache.v_global"),
        ({"cache": fresh(3, 7)._replace(k_ring=jnp.zeros((BATCH, 2, 0, WIDTH)))}, "no slots"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(change, word):
    given = {"query": jnp.zeros((BATCH, HEADS, WIDTH)), "cache": fresh(3, 7)}
    with pytest.raises(ValueError, match=word):
        kernels.lambda_decode(**(given | change))
