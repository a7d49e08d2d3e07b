"""Decoding one token at a time equals rows of lambda_attention, before and after the ring wraps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.decode import cache as caches

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


# The reference by itself runs in the slow lane: everything else is held against it.
BOTH = [pytest.param("reference", marks=pytest.mark.slow), "xla"]


@pytest.mark.parametrize("implementation", BOTH)
def test_windows_of_heads_and_alibi_across_the_wrap(implementation):
    slopes = jnp.linspace(0, 0.3, HEADS)
    options = {"alibi_slopes": slopes, "clip_distance": 9, "logits_soft_cap": 2.0}
    same_rows(5, 7, implementation, head_window=(7, 4), sinks=normal(5, HEADS), **options)


LAYERS = 3


def stack():
    """Caches of three layers: nothing read, half full, wrapped; and one token for each."""
    texts = [normal(20 + layer, BATCH, TOKENS, KEY_HEADS, WIDTH) for layer in range(LAYERS)]
    values = normal(30, BATCH, TOKENS, KEY_HEADS, VALUE_WIDTH)
    counts = (0, 9, TOKENS)
    cached = [
        caches.append(
            fresh(3, 17), key[:, :count], values[:, :count], key_global=2 * key[:, :count]
        )
        for key, count in zip(texts, counts, strict=True)
    ]
    queries = normal(31, LAYERS, BATCH, HEADS, WIDTH)
    return cached, (queries, jnp.stack(texts)[:, :, :1], values[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BOTH)
def test_a_layer_of_stacked_caches_is_that_cache(implementation):
    """Appending to it and reading it, at a traced index, bit for bit."""
    cached, (queries, keys, value) = stack()
    decode = functools.partial(
        kernels.lambda_decode, implementation=implementation, return_residuals=True
    )

    def through(cache, queries):
        def step(cache, given):
            layer, query, key = given
            cache = caches.append(cache, key, value, layer=layer)
            return cache, decode(query, cache, layer=layer)

        return jax.lax.scan(step, cache, (jnp.arange(LAYERS), queries, keys))

    def alone(cache, query, key):
        cache = caches.append(cache, key, value)
        return cache, decode(query, cache)

    found = jax.jit(through)(jax.tree.map(lambda *x: jnp.stack(x), *cached), queries)
    alone = jax.jit(alone)
    right = [alone(*given) for given in zip(cached, queries, keys, strict=True)]
    right = jax.tree.map(lambda *x: np.stack(x), *right)
    jax.tree.map(np.testing.assert_array_equal, found[0], right[0])
    assert_close(found[1], right[1], 1e-6)


def test_a_token_is_written_into_stacked_caches_in_place():
    """The program for a token of every layer has no room for a second stack, nor copies it."""
    layers, window = 6, 512
    one = caches.empty(1, 2, 32, num_global=4, window_size=window, dtype=jnp.float32)
    cache = jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one)
    key = jnp.ones((1, 1, 2, 32))

    def token(cache, query):
        def layer(i, carry):
            cache, query = carry
            cache = caches.append(cache, key, key, layer=i)
            return cache, query + kernels.lambda_decode(query, cache, layer=i)

        return jax.lax.fori_loop(0, layers, layer, (cache, query))

    program = jax.jit(token, donate_argnums=0).lower(cache, jnp.ones((1, 4, 32))).compile()
    # XLA on a CPU copies the layer that it multiplies, keys and values, and no other.
    layer_bytes = 2 * 2 * window * 32 * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * layer_bytes
    assert not [line for line in program.as_text().splitlines()
                if " copy(" in line and f"f32[{layers},1,2,{window},32]" in line]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BOTH)
def test_a_count_of_globals_hides_the_others(implementation):
    """All of them is None; some of them are the same cache cut off, for every key head alone."""
    given = text()
    cache = caches.append(fresh(9, 7), given["key"], given["value"], key_global=given["key_global"])
    query, far = given["query"][:, -1], given["query_global"][:, -1]
    decode = jax.jit(
        functools.partial(
            kernels.lambda_decode, query_global=far, implementation=implementation,
            return_residuals=True,
        )
    )  # fmt: skip
    every = decode(query, cache)
    for count in (jnp.full(BATCH, 9), jnp.full((BATCH, KEY_HEADS), 9)):
        jax.tree.map(np.testing.assert_array_equal, decode(query, cache, global_count=count), every)
    found = decode(query, cache, global_count=jnp.array([[4, 2], [9, 4]]))
    group = HEADS // KEY_HEADS
    cut = cache._replace(k_global=cache.k_global[:, :, :4], v_global=cache.v_global[:, :, :4])
    for row, head, right in ((0, 0, decode(query, cut)), (1, 1, decode(query, cut)), (1, 0, every)):
        at = np.s_[row, head * group : (head + 1) * group]
        assert_close([x[at] for x in found], [x[at] for x in right])


@pytest.mark.parametrize("implementation", BOTH)
def test_gathered_tokens_without_a_ring_are_the_listed_globals_of_attention(implementation):
    given, counts = text(), jnp.array([11, 6])
    lists = jnp.where(jnp.arange(12)[None] < counts[:, None], 2 * jnp.arange(12)[None], -1)
    key, value = given["key"][:, :24:2], given["value"][:, :24:2]
    distance = kernels.GlobalDistance(jnp.full((1, 1), 28), 2 * jnp.arange(12)[None], 0.5)
    options = {"alibi_slopes": jnp.linspace(0, 0.3, HEADS), "global_distance": distance}
    ring = fresh(1, 1)
    cache = kernels.RollingCache(
        *(x.swapaxes(1, 2) for x in (key, value)), ring.k_ring[:, :, :0], ring.v_ring[:, :, :0],
        jnp.full(BATCH, TOKENS),
    )  # fmt: skip
    query = given["query"][:, -1:]

    @jax.jit
    def both(query):
        found = kernels.lambda_decode(
            query[:, 0], cache, global_count=counts, return_residuals=True,
            implementation=implementation, **options,
        )  # fmt: skip
        out, lse = kernels.lambda_attention(
            query, key[:, :0], value[:, :0], key_global=key, value_global=value, num_global=12,
            window_size=0, key_start=TOKENS - 1, global_positions=lists, return_residuals=True,
            implementation="reference", **options,
        )  # fmt: skip
        return found, (out[:, 0], lse[:, :, 0])

    assert_close(*both(query))


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
        ({"alibi_slopes": jnp.zeros(5)}, "alibi_slopes"),
        ({"layer": 0}, "cache.k_ring"),
        ({"global_count": jnp.zeros(3, int)}, "global_count"),
        ({"head_window": (7, 8)}, "head_window=8 exceeds"),
        ({"head_window": (7,)}, "head_window"),
        (
            {"global_distance": kernels.GlobalDistance(jnp.zeros((1, 1)), jnp.zeros((1, 4)))},
            "global_distance",
        ),
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
