"""Every TPU kernel compiled for v5e and v6e at its real size: memory, and instructions as recorded.

recorded.json holds bytes of temporary memory and bundles of instructions; a change for the better
is entered there by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lminf import kernels
from lminf.kernels import SegmentIds
from lminf.kernels.decode import cache as caches
from lminf.kernels.lambda_attention import mosaic_tpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
LENGTH = 131072
HEADS, KEY_HEADS, WIDTH, WINDOW, GLOBALS = 32, 8, 128, 4096, 100


def lambda_shapes(length):
    def shape(rows, heads):
        return jax.ShapeDtypeStruct((1, rows, heads, WIDTH), jnp.bfloat16)

    queries, keys = shape(length, HEADS), shape(length, KEY_HEADS)
    return queries, keys, keys, queries, shape(GLOBALS, KEY_HEADS)


def attend(query, key, value, query_global, key_global):
    return kernels.lambda_attention(
        query, key, value, num_global=GLOBALS, window_size=WINDOW,
        query_global=query_global, key_global=key_global, value_global=value[:, :GLOBALS],
        implementation="mosaic_tpu",
    )  # fmt: skip


def attend_gradients(*arrays):
    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))(*arrays)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("fn", [attend, attend_gradients])
def test_lambda_attention(compile_tpu, recorded, topology, fn):
    """At 131,072 tokens: twice the memory of half as many (four times, were it quadratic)."""
    short, long = (
        compile_tpu(fn, *lambda_shapes(n), topology=TOPOLOGIES[topology])
        for n in (LENGTH // 2, LENGTH)
    )
    assert long.temp_bytes <= 2.1 * short.temp_bytes
    names = {"lambda_forward"}
    if fn is attend_gradients:
        names |= {"lambda_d_query", "lambda_d_key_near", "lambda_d_key_far"}
    assert long.bundles.keys() == names
    bundles = long.bundles if fn is attend_gradients else {}  # the same forward in both
    recorded(topology, {f"{fn.__name__} temp_bytes": long.temp_bytes, **bundles})


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lambda_attention_of_segments(compile_tpu, recorded, topology):
    """Its gathered globals and walks take a tenth more memory, at most, than one text's."""

    def loss(query, key, value, ids):
        return kernels.lambda_attention(
            query, key, value, num_global=GLOBALS, window_size=WINDOW,
            segment_ids=SegmentIds(ids, ids), implementation="mosaic_tpu",
        ).astype(jnp.float32).sum()  # fmt: skip

    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    report = compile_tpu(
        jax.grad(loss, (0, 1, 2)), *lambda_shapes(LENGTH)[:3], ids, topology=TOPOLOGIES[topology]
    )
    names = {f"lambda_{name}" for name in ("forward", "d_query", "d_key_near", "d_key_far")}
    assert report.bundles.keys() == names
    recorded(
        topology,
        {
            f"segments {name}": n
            for name, n in {"temp_bytes": report.temp_bytes, **report.bundles}.items()
        },
    )


def small_blocks(query, key, value, ids=None):
    """Small blocks compile faster."""
    return kernels.lambda_attention(
        query, key, value, num_global=100, window_size=200,
        segment_ids=None if ids is None else SegmentIds(ids, ids),
        implementation="mosaic_tpu", config=mosaic_tpu.Config(128, 128),
    )  # fmt: skip


def test_lambda_attention_under_vmap(compile_tpu):
    """Which the interpreter does not know."""
    shapes = [jax.ShapeDtypeStruct((2, 1, 512, n, 128), jnp.bfloat16) for n in (4, 2, 2)]
    report = compile_tpu(jax.vmap(small_blocks), *shapes, topology="v5e:2x2")
    assert "lambda_forward" in report.bundles


@pytest.mark.parametrize("segments", [False, True])
def test_lambda_attention_under_shard_map(segments):
    """Batch and heads over four chips, forward and backward, with jax's check of what varies."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "heads"))
    split, by_row = PartitionSpec("data", None, "heads"), PartitionSpec("data")
    in_specs = (split, split, split, by_row)[: 4 if segments else 3]
    sharded = jax.shard_map(small_blocks, mesh=mesh, in_specs=in_specs, out_specs=split)
    arrays = [((2, 512, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    arrays.append(((2, 512), jnp.int32))
    shapes = [
        jax.ShapeDtypeStruct(*array, sharding=NamedSharding(mesh, spec))
        for array, spec in zip(arrays, in_specs, strict=False)
    ]

    def loss(*arrays):
        return sharded(*arrays).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().as_text()
    assert "all-gather" not in program
    assert "lambda_d_key_near" in program


def test_lambda_attention_of_lists(compile_tpu):
    """32 groups of 128 queries, each with a list of 512 tokens for every key head and no keys."""
    groups, size, rows = 32, 128, 512

    def loss(query, key, value, positions, starts):
        return kernels.lambda_attention(
            query, key[:, :0], value[:, :0], key_global=key, value_global=value, num_global=rows,
            window_size=0, global_positions=positions, key_start=starts,
            implementation="mosaic_tpu",
        ).astype(jnp.float32).sum()  # fmt: skip

    queries, keys = (
        jax.ShapeDtypeStruct((groups, *shape, WIDTH), jnp.bfloat16)
        for shape in ((size, HEADS), (rows, KEY_HEADS))
    )
    positions, starts = (
        jax.ShapeDtypeStruct((groups, *shape), jnp.int32) for shape in ((KEY_HEADS, rows), ())
    )
    report = compile_tpu(
        jax.grad(loss, (0, 1, 2)), queries, keys, keys, positions, starts, topology="v5e:2x2"
    )
    # Nobody wants the gradients of keys that are not there, so no kernel computes them.
    names = {f"lambda_{name}" for name in ("forward", "d_query", "d_key_far")}
    assert report.bundles.keys() == names


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_linear_cross_entropy(compile_tpu, recorded, topology):
    """Loss and gradients of 8,192 tokens over 256,000 entries: logits would be 4 GB in bfloat16."""
    tokens, width, vocab = 8192, 2304, 256000
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    ]

    def loss(embeddings, classifier, labels):
        return kernels.linear_cross_entropy(
            embeddings, classifier, labels, implementation="mosaic_tpu"
        )

    report = compile_tpu(jax.value_and_grad(loss, (0, 1)), *shapes, topology=TOPOLOGIES[topology])
    assert report.temp_bytes <= 300e6
    assert report.bundles.keys() == {
        f"cross_entropy_{name}" for name in ("forward", "d_embeddings", "d_classifier")
    }
    recorded(topology, report.bundles)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lambda_decode(compile_tpu, recorded, topology):
    """One step copies none of the cache, whose 17 MB it reads."""
    cache = jax.eval_shape(
        functools.partial(caches.empty, 1, KEY_HEADS, WIDTH, num_global=GLOBALS, window_size=WINDOW)
    )
    query = jax.ShapeDtypeStruct((1, HEADS, WIDTH), jnp.bfloat16)
    decode = functools.partial(kernels.lambda_decode, implementation="mosaic_tpu")
    report = compile_tpu(decode, query, cache, topology=TOPOLOGIES[topology])
    assert report.temp_bytes <= 1e6
    recorded(topology, report.bundles)


def test_lambda_decode_of_a_layer(compile_tpu):
    """A step at a traced layer copies none of the stacked caches."""
    one = functools.partial(
        caches.empty, 1, KEY_HEADS, WIDTH, num_global=GLOBALS, window_size=WINDOW
    )
    cache = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.stack([x] * 4), one()))
    query = jax.ShapeDtypeStruct((1, HEADS, WIDTH), jnp.bfloat16)

    def decode(query, cache, layer, count):
        return kernels.lambda_decode(
            query, cache, layer=layer, global_count=count, implementation="mosaic_tpu"
        )

    layer, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    report = compile_tpu(decode, query, cache, layer, count, topology="v5e:2x2")
    assert report.temp_bytes <= 1e6
    assert report.bundles.keys() == {"lambda_decode"}


@pytest.mark.parametrize("topology", ["v5e"])
def test_block_sparse_attention(compile_tpu, recorded, topology):
    """At 131,072 tokens, 16 blocks of 512 for each: lists in scalar memory, no scores in memory."""
    block, listed = 512, 16
    shapes = lambda_shapes(LENGTH)[:3]
    indices = jax.ShapeDtypeStruct((1, KEY_HEADS, LENGTH // block, listed), jnp.int32)

    def loss(query, key, value, indices):
        return kernels.block_sparse_attention(
            query, key, value, block_indices=indices, block_counts=(indices >= 0).sum(-1),
            block_q=block, block_kv=block, implementation="mosaic_tpu",
        ).astype(jnp.float32).sum()  # fmt: skip

    report = compile_tpu(
        jax.grad(loss, (0, 1, 2)), *shapes, indices, topology=TOPOLOGIES[topology]
    )  # fmt: skip
    assert report.bundles.keys() == {
        f"block_sparse_{name}" for name in ("forward", "d_query", "d_key")
    }
    found = {"block_sparse temp_bytes": report.temp_bytes, **report.bundles}
    recorded(topology, found)
