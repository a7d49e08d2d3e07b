"""What the interpreter computes: each check returns relative errors against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lminf import kernels
from lminf.kernels import SegmentIds
from lminf.kernels.cross_entropy import triton as loss_triton
from lminf.kernels.decode import triton as decode_triton
from lminf.kernels.lambda_attention import triton as lambda_triton
from tests.kernels import test_block_sparse as blocks
from tests.kernels.test_lambda_attention import listed, normal

BATCH, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 2, 21, 53, 16, 24
OFFSET = KEYS - QUERIES

SQUARE = lambda_triton.config_of(*(lambda_triton.Tile(16, 16, 4, 1),) * 3)
# Tiles of unequal sides, and other ones in every kernel.
UNEQUAL = lambda_triton.config_of(
    lambda_triton.Tile(32, 16, 4, 1),
    lambda_triton.Tile(16, 32, 4, 1),
    lambda_triton.Tile(16, 64, 4, 1),
)


def errors(found, expected) -> dict[str, float]:
    """Relative error of every result; inf where the empty rows are not the same ones, or NaN."""
    assert found.keys() == expected.keys()
    result = {}
    for name, right in expected.items():
        left = found[name]
        same = np.array_equal(np.isneginf(left), np.isneginf(right)) and not np.isnan(left).any()
        left, right = (np.where(np.isneginf(x), 0, x) for x in (left, right))
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-3)
        result[name] = float(error) if same else float("inf")
    return result


def operands(*, heads=2, key_heads=1, rows=None, sinks=False, keys=KEYS):
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
    d_out = jnp.asarray(normal(7, BATCH, QUERIES, heads, VALUE_WIDTH), dtype)
    d_lse = jnp.asarray(normal(8, BATCH, heads, QUERIES), statistics)

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

    grads, (out, lse) = jax.grad(loss, has_aux=True)(given)
    found = {"out": out, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def attention(inputs, options, *, dtype=np.float32, config=SQUARE):
    """The check of one call of lambda_attention: output, LSE, every gradient."""

    def check():
        given = operands(**inputs)
        chosen = {"query_offset": OFFSET} | options
        if chosen.pop("packed", False):
            chosen["segment_ids"] = packed()
        if lists := chosen.pop("lists", None):
            chosen["global_positions"] = listed(BATCH, *lists, most=KEYS)
        if chosen.pop("slopes", False):
            # One is 0: nothing may divide by it.
            chosen["alibi_slopes"] = jnp.linspace(0, 0.3, given["query"].shape[2])
        if chosen.pop("far", False):
            chosen["global_distance"] = kernels.GlobalDistance(
                jnp.arange(QUERIES, dtype=jnp.int32)[None] + 90,
                jnp.arange(given["key_global"].shape[1], dtype=jnp.int32)[None] * 3,
                0.25,
            )
        found = results(
            given, implementation="triton", dtype=dtype, config=config, **chosen
        )  # fmt: skip
        given = {n: np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in given.items()}
        with jax.enable_x64(True):
            expected = results(given, implementation="reference", dtype=np.float64, **chosen)
        return errors(found, expected)

    return check


def packed() -> SegmentIds:
    """Two rows of segments: one ends in padding, one starts with it."""
    ids = np.zeros((BATCH, KEYS), np.int32)
    ids[0, 10:13], ids[0, 13:48], ids[0, 48:] = 1, 2, -1
    ids[1, :5], ids[1, 5:37], ids[1, 37:] = -1, 5, 3
    ids = jnp.asarray(ids)
    return SegmentIds(ids[:, OFFSET:], ids)


def attention_under_vmap():
    """Gradients of a mapped call against those of one call with a batch axis."""
    given = {name: jnp.asarray(x) for name, x in operands(rows=3, sinks=True).items()}
    sinks = given.pop("sinks")
    d_out = normal(7, *given["query"].shape[:3], VALUE_WIDTH)
    attend = functools.partial(
        kernels.lambda_attention, num_global=3, window_size=20, query_offset=OFFSET,
        implementation="triton", config=SQUARE,
    )  # fmt: skip

    def together(given, sinks):
        return (attend(**given, sinks=sinks) * d_out).sum()

    def apart(given, sinks):
        def one(given, d_out):
            row = {name: x[None] for name, x in given.items()}
            return (attend(**row, sinks=sinks)[0] * d_out).sum()

        return jax.vmap(one)(given, d_out).sum()

    found, expected = (
        {f"d_{n}": np.asarray(x, np.float64) for n, x in (*grads.items(), ("sinks", d_sinks))}
        for grads, d_sinks in (jax.grad(f, (0, 1))(given, sinks) for f in (apart, together))
    )
    return errors(found, expected)


CACHE = {"num_global": 4, "window_size": 10, "key_start": np.array([-37, 30], np.int32)}


def invisible_keys_and_a_second_run():
    """0 where two runs agree, though keys that no query sees hold huge numbers in the second."""
    given = operands(rows=4, sinks=True)

    def run():
        return results(
            given, implementation="triton", config=SQUARE, query_offset=OFFSET,
            **CACHE | {"key_start": jnp.asarray(CACHE["key_start"])},
        )  # fmt: skip

    before = run()
    given["key"][0, :37] += 100
    given["value"][0, :37] = 1e6
    given["key"][1, : OFFSET - 10] = 1e6
    after = run()
    kept = ("out", "lse", "d_query", "d_query_global", "d_sinks")
    return {name: float(not np.array_equal(after[name], before[name])) for name in kept}


def cache_chunk():
    """Row 0: 37 empty slots, so that some queries see nothing; row 1: a window far along."""
    options = CACHE | {"key_start": jnp.asarray(CACHE["key_start"])}
    return attention({"rows": 4, "sinks": True}, options)()


# name -> (inputs, options, tiles): T=21, S=53, so that nothing is a multiple of a tile.
LAMBDA_CASES = {
    "sinks, window and globals": ({"sinks": True}, {"num_global": 3, "window_size": 20}, SQUARE),
    "causal": ({}, {"num_global": 0, "window_size": KEYS}, UNEQUAL),
    "every far key": ({"rows": KEYS}, {"num_global": KEYS, "window_size": 7}, UNEQUAL),
    "segments": ({"sinks": True}, {"num_global": 3, "window_size": 10, "packed": True}, SQUARE),
    "segments, every far key": (
        {"rows": KEYS}, {"num_global": KEYS, "window_size": 5, "packed": True}, UNEQUAL,
    ),
    "segments shorter than a block": (
        {}, {"num_global": 2, "window_size": 3, "packed": True}, UNEQUAL,
    ),
    "soft cap": ({"rows": 3}, {"num_global": 3, "window_size": 20, "logits_soft_cap": 2.0}, SQUARE),
    "one query head a key head": (
        {"key_heads": 2}, {"num_global": 0, "window_size": 33, "scale": 0.3}, SQUARE,
    ),
    "window of 1": ({"rows": 5}, {"num_global": 5, "window_size": 1}, SQUARE),
    "four query heads a key head, g of S": (
        {"heads": 4}, {"num_global": KEYS, "window_size": 30}, UNEQUAL,
    ),
    "eight query heads a key head, g past S": (
        {"heads": 8}, {"num_global": KEYS + 5, "window_size": 40}, UNEQUAL,
    ),
    "queries before the keys": (
        {"sinks": True}, {"num_global": 2, "window_size": 9, "query_offset": -10}, SQUARE,
    ),
    "queries after the keys": (
        {"rows": 6}, {"num_global": 6, "window_size": 9, "query_offset": OFFSET + 5}, SQUARE,
    ),
    "ALiBi": (
        {"heads": 4, "sinks": True},
        {"num_global": KEYS, "window_size": 11, "slopes": True, "logits_soft_cap": 5.0},
        UNEQUAL,
    ),
    "ALiBi with a limit, segments": (
        {"heads": 4},
        {"num_global": 3, "window_size": 10, "slopes": True, "clip_distance": 12, "packed": True},
        SQUARE,
    ),
    "ALiBi at given distances": (
        {"rows": 20}, {"num_global": 20, "window_size": 15, "slopes": True, "far": True}, UNEQUAL,
    ),
    "listed globals, ALiBi": (
        {"rows": 35, "sinks": True},
        {"num_global": 35, "window_size": 15, "slopes": True, "lists": (35,)},
        UNEQUAL,
    ),
    "lists of key heads and no keys": (
        {"heads": 4, "key_heads": 2, "rows": 35, "keys": 0},
        {"num_global": 35, "window_size": 0, "lists": (2, 35), "logits_soft_cap": 3.0},
        SQUARE,
    ),
    "heads that differ": (
        {"heads": 4, "key_heads": 2},
        {"num_global": 4, "window_size": 8, "head_window": (35, KEYS), "head_num_global": (4, 0)},
        SQUARE,
    ),
}  # fmt: skip
LAMBDA = {
    name: attention(inputs, options, config=config)
    for name, (inputs, options, config) in LAMBDA_CASES.items()
} | {"a chunk against a cache": cache_chunk, "vmap": attention_under_vmap}
LOW_PRECISION = {
    f"{name}, {dtype.__name__}": attention(
        LAMBDA_CASES[name][0], LAMBDA_CASES[name][1], dtype=dtype, config=LAMBDA_CASES[name][2]
    )
    for name, dtype in (("sinks, window and globals", jnp.bfloat16), ("causal", jnp.float16))
}
INVISIBLE = "invisible keys and a second run"
CHECKS = LAMBDA | LOW_PRECISION | {INVISIBLE: invisible_keys_and_a_second_run}


# --- Cross-entropy --------------------------------------------------------------------------------

ROWS, ENTRIES, FEATURES = 37, 91, 40
LOSS_TILES = loss_triton.config_of(*(loss_triton.Tile(16, 32, 32, 4, 1),) * 3)


def loss_results(
    implementation, dtype, *, config=None, bias=True, labels=None, rare=0.0, **options
):
    """Losses, LSE and every gradient, as numpy float64."""
    if labels is None:
        labels = np.random.default_rng(3).integers(0, ENTRIES, ROWS)
        labels[[3, 30, 31, 32]] = -100
    given = {"e": normal(0, ROWS, FEATURES), "c": 0.5 * normal(1, ENTRIES, FEATURES)}
    if bias:
        given["b"] = normal(2, ENTRIES)
        given["b"][1::2] -= rare  # every other entry, so that only sorting brings them together
    given = {name: jnp.asarray(jnp.asarray(x, options.get("rounded", dtype)), dtype)
             for name, x in given.items()}  # fmt: skip
    options.pop("rounded", None)

    def loss(given):
        loss, lse = kernels.linear_cross_entropy(
            given["e"], given["c"], jnp.asarray(labels), bias=given.get("b"), return_lse=True,
            reduction="none", implementation=implementation, config=config, **options,
        )  # fmt: skip
        weight = jnp.linspace(0.5, 1.5, ROWS, dtype=loss.dtype)
        return (loss * weight).sum() + 0.1 * (lse * weight).sum(), (loss, lse)

    grads, (losses, lse) = jax.grad(loss, has_aux=True)(given)
    found = {"loss": losses, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def cross_entropy(options, dtype=np.float32):
    """The check of one call of linear_cross_entropy."""

    def check():
        found = loss_results("triton", dtype, config=LOSS_TILES, **options)
        with jax.enable_x64(True):
            expected = loss_results("reference", np.float64, rounded=dtype, **options)
        return errors(found, expected)

    return check


def filtered_gradients():
    """By how much filtering moves dE and dC, in units of what the skipped mass allows.

    A skipped probability is below eps, so no element of dE moves by more than eps * V * max|C|
    times its row's weight, none of dC by more than eps * rows * max|E|, and d(bias) not at all.
    """
    eps = 2e-3
    peaked = {"rare": 20.0, "labels": np.arange(ROWS) % 8 * 2}
    largest = {
        "e": np.abs(normal(0, ROWS, FEATURES)).max(),
        "c": 0.5 * np.abs(normal(1, ENTRIES, FEATURES)).max(),
    }
    weight = 1.5 + 0.15  # at most, of the loss and of the LSE
    result = {}
    for name in ("atomic", "deterministic"):
        options = {"deterministic": name == "deterministic", "filter_eps": eps} | peaked
        found = loss_results("triton", np.float32, config=LOSS_TILES, **options)
        exact = loss_results("triton", np.float32, config=LOSS_TILES, filter_eps=None, **peaked)
        moved = {key: np.abs(found[key] - exact[key]).max() for key in ("d_e", "d_c", "d_b")}
        result |= {
            f"{name} dE": moved["d_e"] / (eps * ENTRIES * weight * largest["c"]),
            f"{name} dC": moved["d_c"] / (eps * ROWS * weight * largest["e"]),
            f"{name} bias": moved["d_b"] * 1e4,
            # Something must have been skipped, or this shows nothing.
            f"{name} skipped nothing": float(moved["d_e"] == 0),
        }
    return {key: float(value) for key, value in result.items()}


def deterministic_twice():
    """0 where two deterministic runs agree bit for bit."""
    options = {"deterministic": True, "config": LOSS_TILES}
    before, after = (loss_results("triton", np.float32, **options) for _ in range(2))
    return {name: float(not np.array_equal(before[name], after[name])) for name in before}


EVERYTHING = {"logits_soft_cap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-2}
LOSS_CASES = {
    "plain": {"filter_eps": None, "bias": False},
    "every option": {"filter_eps": None} | EVERYTHING,
    "every option, deterministic": {"filter_eps": None, "deterministic": True} | EVERYTHING,
    "automatic filter, unsorted": {"sort_vocab": False},
    "no label counts": {"labels": np.full(ROWS, -100)},
}
LOSS = {f"loss: {name}": cross_entropy(options) for name, options in LOSS_CASES.items()}
LOW_LOSS = {
    f"loss: every option, {dtype.__name__}": cross_entropy(LOSS_CASES["every option"], dtype)
    for dtype in (jnp.bfloat16, jnp.float16)
}
FILTER, TWICE = "loss: filtered", "loss: twice"

# --- Decoding -------------------------------------------------------------------------------------


def decode(
    batch, heads, key_heads, ranks, window, lengths, *, dtype=np.float32, sinks=True, grad=False,
    layers=(), **options,
):  # fmt: skip
    """The check of one call of lambda_decode."""

    def call(implementation, dtype, rounded, config=None):
        def random(seed, *shape):
            return jnp.asarray(jnp.asarray(normal(seed, *shape), rounded), dtype)

        keys, values, ring, ring_values = (
            (*layers, batch, key_heads, slots, width)
            for slots in (ranks, window) for width in (WIDTH, VALUE_WIDTH)
        )  # fmt: skip
        given = {
            "query": random(0, batch, heads, WIDTH),
            "query_global": random(1, batch, heads, WIDTH),
            "k_global": random(2, *keys), "v_global": random(3, *values),
            "k_ring": random(4, *ring), "v_ring": random(5, *ring_values),
        }  # fmt: skip
        if sinks:
            given["sinks"] = random(6, heads)
        length = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (*layers, batch))
        more = {name: x() if callable(x) else x for name, x in options.items()}

        def attend(given):
            slots = {name: given[name] for name in ("k_global", "v_global", "k_ring", "v_ring")}
            out, lse = kernels.lambda_decode(
                given["query"], kernels.RollingCache(**slots, length=length),
                query_global=given["query_global"], sinks=given.get("sinks"),
                return_residuals=True, implementation=implementation, config=config, **more,
            )  # fmt: skip
            return out.astype(lse.dtype).sum(), (out, lse)

        grads, (out, lse) = {}, attend(given)[1]
        if grad:
            grads, _ = jax.grad(attend, has_aux=True)(given)
        found = {"out": out, "lse": lse} | {f"d_{name}": x for name, x in grads.items()}
        return {name: np.asarray(x, np.float64) for name, x in found.items()}

    def check():
        found = call("triton", dtype, dtype, decode_triton.Config(16, 12, 4, 1))
        with jax.enable_x64(True):
            expected = call("reference", np.float64, dtype)
        return errors(found, expected)

    return check


# name -> check; options that are functions are called for their arrays.
DECODE = {
    "decode: a layer of a stack, counts, windows of heads": decode(
        3, 4, 2, 30, 21, (0, 13, 60), grad=True, layers=(3,), layer=lambda: jnp.int32(1),
        head_window=(21, 6), global_count=lambda: jnp.array([[3, 30], [9, 4], [26, 40]]),
    ),
    "decode: ALiBi with a limit": decode(
        2, 4, 2, 37, 7, (30, 5), alibi_slopes=lambda: jnp.linspace(0, 0.3, 4), clip_distance=9,
        logits_soft_cap=3.0,
    ),
    "decode: gathered tokens, no ring, ALiBi at given distances": decode(
        2, 4, 2, 19, 0, (30, 50), global_count=lambda: jnp.array([17, 4]),
        alibi_slopes=lambda: jnp.linspace(0, 0.3, 4),
        global_distance=lambda: kernels.GlobalDistance(
            jnp.array([[60], [70]]), 3 * jnp.arange(19)[None], 0.25
        ),
    ),
    "decode: an empty row, a short one, a long one": decode(3, 4, 2, 5, 21, (0, 13, 60), grad=True),
    "decode: no globals, one head": decode(2, 1, 1, 0, 37, (37, 5), sinks=False),
    "decode: more globals than window, eight heads": decode(
        2, 8, 1, 37, 1, (30, 500), logits_soft_cap=2.0
    ),
}  # fmt: skip
LOW_DECODE = {
    "decode: bfloat16": decode(1, 4, 1, 5, 40, (100,), dtype=jnp.bfloat16),
}
CHECKS |= LOSS | LOW_LOSS | DECODE | LOW_DECODE
CHECKS |= {FILTER: filtered_gradients, TWICE: deterministic_twice}

# --- Block-sparse attention -----------------------------------------------------------------------


def block_sparse(options, *, dtype=np.float32, config=SQUARE, heads=2):
    """The check of one call of block_sparse_attention: output, LSE, every gradient."""

    def check():
        chosen, given = options(), blocks.operands(heads * blocks.KEY_HEADS)
        found = blocks.results(given, implementation="triton", dtype=dtype, config=config, **chosen)
        given = {n: np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in given.items()}
        return errors(found, blocks.oracle(given, **chosen))

    return check


def block_sparse_under_vmap():
    """Gradients of a mapped call against those of one call with a batch axis."""
    given = {name: jnp.asarray(x) for name, x in blocks.operands(2).items()}
    lists = blocks.drawn(2, q_blocks=3, kv_blocks=3)

    def attend(given, lists):
        return kernels.block_sparse_attention(
            **given, **lists, block_q=16, block_kv=16, implementation="triton", config=SQUARE,
        )  # fmt: skip

    def apart(given, lists):
        return attend(*jax.tree.map(lambda x: x[None], (given, lists)))[0]

    found, expected = (
        {
            f"d_{name}": np.asarray(x, np.float64)
            for name, x in jax.grad(lambda g, f=f: (f(g, lists) ** 2).sum())(given).items()
        }
        for f in (jax.vmap(apart), attend)
    )
    return errors(found, expected)


def block_sparse_twice():
    """0 where two runs agree bit for bit."""
    options = whole_tiles() | {"implementation": "triton", "config": SQUARE}
    before, after = (blocks.results(blocks.operands(2), **options) for _ in range(2))
    return {name: float(not np.array_equal(before[name], after[name])) for name in before}


def of_size(block_q, block_kv, list_heads=1, **options):
    """Random lists of blocks of this size over the 45 tokens."""
    counts = (-(-blocks.TOKENS // size) for size in (block_q, block_kv))
    lists = blocks.drawn(list_heads, **dict(zip(("q_blocks", "kv_blocks"), counts, strict=True)))
    return {"block_q": block_q, "block_kv": block_kv} | lists | options


def whole_tiles():
    return of_size(16, 16, 2, logits_soft_cap=2.0)


# Blocks smaller than a tile, as large (some tiles need no mask), and of several tiles.
SPARSE_CASES = {
    "one list": (blocks.CASES["one list"], UNEQUAL),
    "not causal": (lambda: of_size(16, 16, causal=False, scale=0.3), SQUARE),
    "soft cap, a list for each head": (whole_tiles, SQUARE),
    "several tiles a block": (lambda: of_size(32, 32), SQUARE),
    "several tiles and a part": (lambda: of_size(20, 40), SQUARE),
}  # fmt: skip
SPARSE = {
    f"blocks: {name}": block_sparse(options, config=config)
    for name, (options, config) in SPARSE_CASES.items()
} | {"blocks: vmap": block_sparse_under_vmap}
LOW_SPARSE = {
    f"blocks: {dtype.__name__}": block_sparse(whole_tiles, dtype=dtype, heads=1)
    for dtype in (jnp.bfloat16, jnp.float16)
}
SPARSE_TWICE = "blocks: twice"
CHECKS |= SPARSE | LOW_SPARSE | {SPARSE_TWICE: block_sparse_twice}
