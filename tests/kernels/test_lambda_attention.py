"""Every option of lambda_attention, values and gradients, against the dense float64 reference."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lminf import kernels
from lminf.kernels import GlobalDistance, SegmentIds
from lminf.kernels.lambda_attention import xla
from lminf.kernels.lambda_attention.xla_chunked import Config

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 45, 101, 6, 2, 16, 24
OFFSET = KEYS - QUERIES  # the queries are the last rows

# Small tiles, so that a short row has clear tiles, narrow edges and an incomplete last block.
SMALL = Config(block_q=8, block_k=32, edge_k=8)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(*, rows=None, sinks=False, heads=HEADS, key_heads=KEY_HEADS, keys=KEYS):
    """Random inputs; with `rows`, separate operands for the global branch."""
    given = {
        "query": normal(0, BATCH, QUERIES, heads, WIDTH),
        "key": normal(1, BATCH, keys, key_heads, WIDTH),
        "value": normal(2, BATCH, keys, key_heads, VALUE_WIDTH),
    }
    if rows is not None:
        given["query_global"] = normal(3, BATCH, QUERIES, heads, WIDTH)
        given["key_global"] = normal(4, BATCH, rows, key_heads, WIDTH)
        given["value_global"] = normal(5, BATCH, rows, key_heads, VALUE_WIDTH)
    if sinks:
        given["sinks"] = normal(6, heads)
    return given


def results(given, *, implementation, dtype=np.float32, config=None, **options):
    """Output, LSE and gradients with respect to every operand, as numpy float64."""
    given = {name: jnp.asarray(x, dtype) for name, x in given.items()}
    statistics = jnp.float64 if dtype == np.float64 else jnp.float32
    heads = given["query"].shape[2]
    length = given["query"].shape[1]
    d_out = jnp.asarray(normal(7, BATCH, length, heads, VALUE_WIDTH), dtype)
    d_lse = jnp.asarray(normal(8, BATCH, heads, length), statistics)

    def loss(given):
        out, lse = kernels.lambda_attention(
            **given,
            **options,
            return_residuals=True,
            implementation=implementation,
            config=config,
        )
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return (out * d_out).astype(statistics).sum() + (seen * d_lse).sum(), (out, lse)

    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, (out, lse) = grad(given)
    found = {"out": out, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def assert_close(found, expected, *, value=2e-6, gradient=5e-6):
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        np.testing.assert_array_equal(np.isneginf(found[name]), np.isneginf(right), name)
        left, right = (np.where(np.isneginf(x), 0, x) for x in (found[name], right))
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-3)
        assert error <= (gradient if name.startswith("d_") else value), (name, error)  # not NaN


def oracle(given, **options):
    with jax.enable_x64(True):
        return results(given, implementation="reference", dtype=np.float64, **options)


def packed():
    """Two rows of segments: one ends in padding, one starts with it."""
    ids = np.zeros((BATCH, KEYS), np.int32)
    ids[0, 20:23], ids[0, 23:95], ids[0, 95:] = 1, 2, -1
    ids[1, :9], ids[1, 9:70], ids[1, 70:] = -1, 5, 3
    ids = jnp.asarray(ids)
    return SegmentIds(ids[:, OFFSET:], ids)


def listed(*shape, most=KEYS):
    """Random lists of positions: hidden rows stand before and after them, and one list is empty."""
    rng = np.random.default_rng(10)
    lists = np.full(shape, -1, np.int32)
    for at in np.ndindex(*shape[:-1]):
        first, last = rng.integers(0, 3), shape[-1] - rng.integers(0, 4)
        lists[at][first:last] = np.sort(rng.choice(most, last - first, replace=False))
    lists[(-1,) * (len(shape) - 1)] = -1
    return jnp.asarray(lists)


def slopes():
    return jnp.asarray(0.05 * np.abs(normal(9, HEADS)))


# name -> (inputs, options). All are causal: the last 45 of 101 rows ask.
CASES = {
    "window and sinks": (
        lambda: operands(sinks=True),
        lambda: {"num_global": 3, "window_size": 50, "query_offset": jnp.int32(OFFSET)},
    ),
    "causal": (
        operands,
        lambda: {"num_global": 0, "window_size": KEYS, "query_offset": OFFSET},
    ),
    "every far key": (
        lambda: operands(rows=KEYS),
        lambda: {"num_global": KEYS, "window_size": 7, "query_offset": OFFSET, "scale": 0.3},
    ),
    "a chunk against a cache": (
        # Row 0 of the keys: 77 empty slots (some queries see nothing), then a window far along.
        lambda: operands(rows=4, sinks=True),
        lambda: {
            "num_global": 4,
            "window_size": 40,
            "query_offset": jnp.int32(OFFSET),
            "key_start": jnp.array([-77, 30], jnp.int32),
        },
    ),
    "ALiBi, soft cap": (
        lambda: operands(rows=3),
        lambda: {
            "num_global": 3,
            "window_size": 40,
            "query_offset": OFFSET,
            "alibi_slopes": slopes(),
            "clip_distance": 43,
            "logits_soft_cap": 3.0,
        },
    ),
    "ALiBi at given distances": (
        lambda: operands(rows=KEYS),
        lambda: {
            "num_global": KEYS,
            "window_size": 9,
            "query_offset": OFFSET,
            "alibi_slopes": slopes(),
            "global_distance": GlobalDistance(
                jnp.arange(OFFSET, KEYS)[None] // 4 + 9, jnp.arange(KEYS)[None] // 4, 0.5
            ),
        },
    ),
    "segments": (
        lambda: operands(sinks=True),
        lambda: {
            "num_global": 3,
            "window_size": 10,
            "query_offset": OFFSET,
            "segment_ids": packed(),
        },
    ),
    "segments, every far key": (
        lambda: operands(rows=KEYS),
        lambda: {
            "num_global": KEYS,
            "window_size": 5,
            "query_offset": OFFSET,
            "segment_ids": packed(),
        },
    ),
    "listed globals, ALiBi": (
        lambda: operands(rows=40, sinks=True),
        lambda: {
            "num_global": 40,
            "window_size": 20,
            "query_offset": OFFSET,
            "global_positions": listed(BATCH, 40),
            "alibi_slopes": slopes(),
            "clip_distance": 60,
        },
    ),
    "a list for each key head, heads that differ": (
        lambda: operands(rows=40),
        lambda: {
            "num_global": 40,
            "window_size": 20,
            "query_offset": OFFSET,
            "key_start": jnp.array([-60, 7], jnp.int32),
            "global_positions": listed(BATCH, KEY_HEADS, 40),
            "logits_soft_cap": 3.0,
            "head_window": (20, 35),
            "head_num_global": (40, 30),
        },
    ),
    "lists and no keys": (
        lambda: operands(rows=40, keys=0),
        lambda: {
            "num_global": 40,
            "window_size": 0,
            "key_start": jnp.array([3, 50], jnp.int32),
            "global_positions": listed(BATCH, KEY_HEADS, 40),
        },
    ),
    "heads that differ": (
        lambda: operands(rows=4),
        lambda: {
            "num_global": 4,
            "window_size": 8,
            "query_offset": OFFSET,
            "head_window": (35, KEYS),
            "head_num_global": (4, 0),
        },
    ),
}


@functools.cache
def expected(case):
    given, options = CASES[case]
    return oracle(given(), **options())


# Compiling is what costs: this one touches most lines, the others run in the slow lane.
FAST = {"a chunk against a cache"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_chunked(case):
    given, options = CASES[case]
    found = results(given(), implementation="xla_chunked", config=SMALL, **options())
    assert_close(found, expected(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", "xla", "xla_chunked"])
def test_default_config(case, implementation, monkeypatch):
    monkeypatch.setattr(xla, "KEYS", KEYS)  # it refuses what tiles do faster
    given, options = CASES[case]
    assert_close(results(given(), implementation=implementation, **options()), expected(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1e-3)])
@pytest.mark.parametrize("config", [SMALL, None], ids=["tiles", "one tile"])
def test_low_precision(case, dtype, tolerance, config):
    given, options = CASES[case]
    rounded = {n: np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in given().items()}
    found = results(given(), implementation="xla_chunked", dtype=dtype, config=config, **options())
    assert_close(
        found, oracle(rounded, **options()), value=tolerance, gradient=max(tolerance, 2e-3)
    )


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        given, options = CASES["window and sinks"]
        found = results(
            given(), implementation="xla_chunked", dtype=np.float64, config=SMALL, **options()
        )
    assert_close(found, expected("window and sinks"), value=1e-14, gradient=1e-14)


@pytest.mark.slow
@hypothesis.given(
    window=st.one_of(st.integers(1, 120), st.sampled_from([1, KEYS])),
    num_global=st.one_of(st.integers(0, 12), st.sampled_from([KEYS, KEYS + 5])),
    offset=st.integers(-10, OFFSET + 10),
    group=st.sampled_from([1, 2, 4, 8]),
    config=st.builds(
        Config,
        block_q=st.sampled_from([1, 5, 16, 64]),
        block_k=st.sampled_from([16, 48, 512]),
        edge_k=st.sampled_from([1, 16, 128]),
    ),
    segments=st.booleans(),
)
@hypothesis.settings(max_examples=25)
def test_odd_sizes(window, num_global, offset, group, config, segments):
    options = {"num_global": num_global, "window_size": window, "query_offset": offset}
    if segments:
        ids = packed().kv
        rows = np.clip(np.arange(offset, offset + QUERIES), 0, KEYS - 1)
        options |= {"segment_ids": SegmentIds(ids[:, rows], ids)}
        if not 0 <= offset <= OFFSET:
            options["query_offset"] = 3
            options["segment_ids"] = SegmentIds(ids[:, 3 : 3 + QUERIES], ids)
    given = operands(heads=2 * group, key_heads=2, sinks=True)
    found = results(given, implementation="xla_chunked", config=config, **options)
    assert_close(found, oracle(given, **options))


def test_reference_is_the_definition():
    """Pair by pair in plain Python: positions, both branches, the sink in the denominator."""
    start, offset, window, count = -2, 4, 3, 2
    rng = np.random.default_rng(0)
    q, qg = rng.standard_normal((2, 1, 6, 1, 4))
    k, v = rng.standard_normal((2, 1, 9, 1, 4))
    kg, vg = rng.standard_normal((2, 1, count, 1, 4))
    sink = 0.3
    with jax.enable_x64(True):
        out, lse = kernels.lambda_attention(
            *(jnp.asarray(x) for x in (q, k, v)),
            num_global=count,
            window_size=window,
            query_global=jnp.asarray(qg),
            key_global=jnp.asarray(kg),
            value_global=jnp.asarray(vg),
            query_offset=offset,
            key_start=jnp.int32(start),
            sinks=jnp.asarray([sink]),
            return_residuals=True,
            implementation="reference",
        )
    for i in range(6):
        position = start + offset + i
        near = [j for j in range(9) if 0 <= position - (start + j) < window and start + j >= 0]
        far = [r for r in range(count) if position - r >= window]
        logits = [q[0, i, 0] @ k[0, j, 0] / 2 for j in near]
        logits += [qg[0, i, 0] @ kg[0, r, 0] / 2 for r in far]
        values = [v[0, j, 0] for j in near] + [vg[0, r, 0] for r in far]
        total = np.exp(sink) + np.sum(np.exp(logits))
        mean = sum(np.exp(x) * value for x, value in zip(logits, values, strict=True)) / total
        np.testing.assert_allclose(out[0, i, 0], mean, rtol=1e-12)
        np.testing.assert_allclose(lse[0, 0, i], np.log(total), rtol=1e-12)


@pytest.mark.slow
def test_lists_of_positions_are_the_definition():
    """Pair by pair: a row is seen from its position on, w tokens later, by its key head alone."""
    start, window, rows = 6, 2, 7
    lists = listed(BATCH, KEY_HEADS, rows, most=12)
    given = {n: jnp.asarray(x[:, :9]) for n, x in operands(rows=rows, keys=0, heads=2).items()}
    with jax.enable_x64(True):
        found = kernels.lambda_attention(
            **{n: x.astype(jnp.float64) for n, x in given.items()}, num_global=rows,
            window_size=window, key_start=start, global_positions=lists, implementation="reference",
            return_residuals=True,
        )  # fmt: skip
    q, k, v = (np.asarray(given[f"{n}_global"], np.float64) for n in ("query", "key", "value"))
    for b, i, h in np.ndindex(BATCH, 9, KEY_HEADS):
        at = np.asarray(lists[b, h])
        seen = (at >= 0) & (start + i - at >= window)
        weights = np.exp(k[b, seen, h] @ q[b, i, h] * WIDTH**-0.5)
        right = weights @ v[b, seen, h] / max(weights.sum(), 1e-30)
        np.testing.assert_allclose(found.out[b, i, h], right, rtol=1e-12)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(found.lse[b, h, i], np.log(weights.sum()), rtol=1e-12)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("xla_chunked", marks=pytest.mark.slow)]
)
def test_positions_0_1_2_are_what_none_means(implementation, monkeypatch):
    monkeypatch.setattr(xla, "KEYS", KEYS)
    given, options = CASES["every far key"]
    run = functools.partial(results, given(), implementation=implementation, **options())
    lists = jnp.broadcast_to(jnp.arange(KEYS), (BATCH, KEYS))
    found, right = run(global_positions=lists), run()
    for name, x in right.items():
        np.testing.assert_array_equal(found[name], x, name)


def test_a_window_merged_with_lists_of_all_earlier_tokens_is_full_attention():
    """Groups of 15 queries, folded into the batch, each with the tokens before its end."""
    groups, size = BATCH * 3, QUERIES // 3
    call = functools.partial(kernels.lambda_attention, return_residuals=True)

    def merged(query, key, value):
        near = call(query, key, value, num_global=0, window_size=8)
        far = call(
            query.reshape(groups, size, HEADS, WIDTH),
            *(x[:, :0].repeat(3, 0) for x in (key, value)),
            key_global=key.repeat(3, 0), value_global=value.repeat(3, 0),
            num_global=QUERIES, window_size=8, key_start=jnp.arange(groups) % 3 * size,
            global_positions=jnp.broadcast_to(jnp.arange(QUERIES)[None], (groups, QUERIES)),
        )  # fmt: skip
        lse = far.lse.reshape(BATCH, 3, HEADS, size).swapaxes(1, 2).reshape(near.lse.shape)
        total = jnp.logaddexp(near.lse, lse)
        shares = [jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in (near.lse, lse)]
        return near.out * shares[0] + far.out.reshape(near.out.shape) * shares[1], total

    given = [jnp.asarray(x[:, -QUERIES:]) for x in operands().values()]
    found = jax.jit(merged)(*given)
    full = jax.jit(functools.partial(call, num_global=0, window_size=QUERIES))(*given)
    for left, right in zip(found, full, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6)


@pytest.mark.slow
def test_unseen_rows_are_empty_and_invisible_keys_do_not_matter():
    given = operands(rows=4, sinks=True)
    options = {
        "num_global": 4,
        "window_size": 10,
        "query_offset": OFFSET,
        "key_start": jnp.array([-77, 30], jnp.int32),
    }

    @jax.jit
    def grad(given, d_out):
        def loss(given):
            attend = functools.partial(
                kernels.lambda_attention, implementation="xla_chunked", config=SMALL, **options
            )
            out, lse = attend(**given, return_residuals=True)
            return (out * d_out).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(given)

    def run(given):
        grads, (out, lse) = grad(given, normal(7, BATCH, QUERIES, HEADS, VALUE_WIDTH))
        found = {"out": out, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
        return {name: np.asarray(x) for name, x in found.items()}

    base = run(given)
    empty = 77 - OFFSET  # queries of row 0 at negative positions
    assert (base["out"][0, :empty] == 0).all()
    assert np.isneginf(base["lse"][0, :, :empty]).all()
    assert (base["d_query"][0, :empty] == 0).all()
    assert (base["d_key"][0, :77] == 0).all()
    # Keys that no query sees: padding of row 0, keys before the first window of row 1.
    given["key"][0, :77] += 100
    given["value"][0, :77] = 1e6
    given["key"][1, : OFFSET - 10] = 1e6
    again = run(given)
    for name in ("out", "lse", "d_query", "d_sinks"):
        np.testing.assert_array_equal(base[name], again[name], name)  # also: two runs agree


@pytest.mark.slow
def test_vmap_and_batch_agree():
    given, options = CASES["causal"]
    given = {n: jnp.asarray(x) for n, x in given().items()}
    attend = functools.partial(
        kernels.lambda_attention, implementation="xla_chunked", config=SMALL,
        **options(),
    )  # fmt: skip
    rows = jax.jit(jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0]))(*given.values())
    out = expected("causal")["out"]
    np.testing.assert_allclose(rows, out, atol=2e-6)


@pytest.mark.slow
def test_temporary_memory_is_linear_in_length():
    """Doubling T adds no more than the copies of queries, keys and values in tile order."""

    def temporary_bytes(length, window, num_global):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 32), jnp.float32) for n in (2, 1, 1)]
        attend = functools.partial(
            kernels.lambda_attention, num_global=num_global, window_size=window,
            implementation="xla_chunked",
        )  # fmt: skip
        compiled = jax.jit(attend).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    inputs = 16384 * 4 * 32 * 4  # bytes at T = 16384, where one tile of scores is small
    for window, num_global in ((256, 10), (2**20, 0)):
        short, long = (temporary_bytes(n, window, num_global) for n in (16384, 32768))
        assert long - short < 1.1 * inputs
        assert short < 2 * inputs


GOOD = {
    "query": (1, 4, 4, 8),
    "key": (1, 4, 2, 8),
    "value": (1, 4, 2, 8),
}


@pytest.mark.parametrize(
    ("shapes", "options", "word"),
    [
        ({"query": (1, 4, 8)}, {}, "query"),
        ({"key": (1, 4, 2, 7)}, {}, "key"),
        ({"value": (1, 5, 2, 8)}, {}, "value"),
        ({"query": (1, 4, 3, 8)}, {}, "heads"),
        ({}, {"window_size": 0}, "window_size=0"),
        ({}, {"num_global": -1}, "num_global=-1"),
        ({}, {"clip_distance": 0}, "clip_distance"),
        ({}, {"sinks": jnp.zeros(3)}, "sinks"),
        ({}, {"alibi_slopes": jnp.zeros((4, 1))}, "alibi_slopes"),
        ({}, {"implementation": "fast"}, "implementation='fast'"),
        ({}, {"key_start": jnp.int32(0)}, "key_start"),
        ({}, {"value_global": jnp.zeros((1, 2, 2, 8))}, "value_global"),
        ({}, {"key_global": jnp.zeros((1, 3, 2, 8))}, "key_global"),
        ({}, {"query_global": jnp.zeros((1, 3, 4, 8))}, "query_global"),
        ({}, {"head_window": (1, 2, 3)}, "head_window"),
        ({}, {"head_num_global": (0, 3)}, "head_num_global"),
        ({}, {"global_positions": jnp.zeros((1, 2), int)}, "global_positions needs"),
        (
            {"key_global": (1, 2, 2, 8), "value_global": (1, 2, 2, 8)},
            {"global_positions": jnp.zeros((1, 3), int)},
            "global_positions has",
        ),
        (
            {},
            {"segment_ids": SegmentIds(jnp.zeros((1, 4), int), jnp.zeros((1, 5), int))},
            "segment_ids.kv",
        ),
        (
            {},
            {"global_distance": GlobalDistance(jnp.zeros((1, 4), int), jnp.zeros((1, 3), int))},
            "global_distance.key",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(shapes, options, word):
    arrays = {name: jnp.zeros(shape) for name, shape in (GOOD | shapes).items()}
    options = {"num_global": 2, "window_size": 2} | options
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        kernels.lambda_attention(**arrays, **options)


def test_explain_and_refusals():
    arrays = {name: jnp.zeros(shape) for name, shape in GOOD.items()}
    big = {name: jax.ShapeDtypeStruct((1, 4096, *shape[2:]), jnp.float32)
           for name, shape in GOOD.items()}  # fmt: skip
    attend = functools.partial(kernels.lambda_attention, num_global=2, window_size=2)
    (short,) = kernels.explain(attend, **arrays)
    assert short.chosen == "xla"
    (long,) = kernels.explain(attend, **big)
    assert long.chosen == "xla_chunked"
    assert "4096 keys, " in str(long)
    assert "logits at once; up to 64 and 4194304" in str(long)
    many = {name: jax.ShapeDtypeStruct((2**20, *x.shape[1:]), x.dtype)
            for name, x in arrays.items()}  # fmt: skip
    (rows,) = kernels.explain(attend, **many)
    assert "logits at once" in str(rows)
    with pytest.raises(ExceptionGroup, match="no implementation") as refusal:
        attend(**arrays, implementation="reference", config=SMALL)
    assert "nothing to configure" in str(refusal.value.exceptions[0])
