"""Machine code of the Triton kernels for the shapes and tiles that the launchers choose, and their
path through jax-triton. Needs no GPU: `triton.compile` and ptxas come with the triton wheel.
"""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import pytest

from lminf import kernels
from lminf.kernels import SegmentIds
from lminf.kernels.common import compat
from tests.kernels.triton import compiling

pytestmark = pytest.mark.aot

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one block


def lambda_launches(
    width, dtype, *, length=131_072, segments=False, alibi=False, lists=False, **options
):  # fmt: skip
    """Forward, gradient of the queries, of keys and values, of the globals' keys and values."""
    query = jax.ShapeDtypeStruct((1, length, 32, width), dtype)
    key = jax.ShapeDtypeStruct((1, length, 8, width), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, ids):
        far = kernels.GlobalDistance(ids, ids[:, :100], 0.5) if alibi == "given" else None
        far_rows = {}
        if lists:
            far_rows = {"key_global": key[:, :100], "value_global": value[:, :100],
                        "global_positions": ids[:, None, :100].repeat(8, 1)}  # fmt: skip
        out = kernels.lambda_attention(
            query, key, value, num_global=100, window_size=4096, implementation="triton",
            segment_ids=SegmentIds(ids, ids) if segments else None, global_distance=far,
            alibi_slopes=jnp.linspace(0.1, 1, 32) if alibi else None, **options,
            **far_rows,
        )  # fmt: skip
        return out.astype(jnp.float32).sum()

    return compiling.launches_of(jax.grad(loss, (0, 1, 2)), query, key, key, ids)


def loss_launches(dtype, *, rows=8192, width=2304, vocab=256_000, **options):
    """Statistics, and the gradients: one launch, or two where they are deterministic."""
    shapes = [
        jax.ShapeDtypeStruct((rows, width), dtype),
        jax.ShapeDtypeStruct((vocab, width), dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    call = functools.partial(kernels.linear_cross_entropy, implementation="triton", **options)
    return compiling.launches_of(jax.grad(call, (0, 1)), *shapes)


def sparse_launches(width, dtype, *, block=64, **options):
    """Forward, gradient of the queries, of keys and values; 64 blocks a list."""
    length, listed = 131_072, 64
    query = jax.ShapeDtypeStruct((1, length, 32, width), dtype)
    key = jax.ShapeDtypeStruct((1, length, 8, width), dtype)
    indices = jax.ShapeDtypeStruct((1, 8, length // block, listed), jnp.int32)

    def loss(query, key, value, indices):
        out = kernels.block_sparse_attention(
            query, key, value, block_indices=indices, block_counts=(indices >= 0).sum(-1),
            block_q=block, block_kv=block, implementation="triton", **options,
        )  # fmt: skip
        return out.astype(jnp.float32).sum()

    return compiling.launches_of(jax.grad(loss, (0, 1, 2)), query, key, key, indices)


def decode_launches(width, dtype, *, batch=1, layers=(), **options):
    """The parts and their combination."""

    def zeros(*shape):
        return jax.ShapeDtypeStruct((*shape,), dtype)

    cache = kernels.RollingCache(
        zeros(*layers, batch, 8, 100, width), zeros(*layers, batch, 8, 100, width),
        zeros(*layers, batch, 8, 4096, width), zeros(*layers, batch, 8, 4096, width),
        jax.ShapeDtypeStruct((*layers, batch), jnp.int32),
    )  # fmt: skip
    call = functools.partial(kernels.lambda_decode, implementation="triton", **options)
    return compiling.launches_of(call, zeros(batch, 32, width), cache)


BF16, F32 = jnp.bfloat16, jnp.float32
# name -> (launches, number of them, GPUs, whether each must use Hopper's matrix instructions)
PROGRAMS = {
    "attention, 128 wide": (lambda: lambda_launches(128, BF16), 4, (80, 90, 100), True),
    "attention, 64 wide": (lambda: lambda_launches(64, BF16), 4, (90,), True),
    "attention, 96 wide": (lambda: lambda_launches(96, jnp.float16), 4, (90,), True),
    "attention, 256 wide": (lambda: lambda_launches(256, BF16), 4, (90,), False),
    "attention, 64 wide, float32": (lambda: lambda_launches(64, F32), 4, (80,), False),
    "attention, 128 wide, float32": (lambda: lambda_launches(128, F32), 4, (90,), False),
    "attention, segments": (lambda: lambda_launches(128, BF16, segments=True), 4, (90,), True),
    "attention, ALiBi": (lambda: lambda_launches(128, BF16, alibi="given"), 4, (80, 90, 100), True),
    "attention, ALiBi and segments, 64 wide": (
        lambda: lambda_launches(64, BF16, alibi="own", segments=True, clip_distance=4096),
        4, (90, 100), True,
    ),
    "attention, a list of globals for each head": (
        lambda: lambda_launches(128, BF16, lists=True), 4, (80, 90, 100), True,
    ),
    "attention, lists and ALiBi": (
        lambda: lambda_launches(128, BF16, lists=True, alibi="own"), 4, (90,), True,
    ),
    "attention, soft cap": (
        lambda: lambda_launches(128, BF16, logits_soft_cap=50.0), 4, (90,), True,
    ),
    "blocks of 64": (lambda: sparse_launches(128, BF16), 3, (80, 90, 100), True),
    "blocks of 128, 64 wide": (lambda: sparse_launches(64, BF16, block=128), 3, (90,), True),
    "blocks of 128, every option": (
        lambda: sparse_launches(128, BF16, block=128, logits_soft_cap=50.0),
        3, (90,), True,
    ),
    "blocks of 64, soft cap": (
        lambda: sparse_launches(128, BF16, logits_soft_cap=50.0), 3, (80, 100), False,
    ),
    "blocks of 64, 256 wide": (lambda: sparse_launches(256, BF16), 3, (90,), False),
    "blocks of 64, float32": (lambda: sparse_launches(128, F32), 3, (90,), False),
    "loss": (lambda: loss_launches(BF16), 2, (80, 90, 100), True),
    "loss, deterministic": (lambda: loss_launches(BF16, deterministic=True)[1:], 2, (80, 90), True),
    "loss, every option": (
        lambda: loss_launches(BF16, logits_soft_cap=30.0, label_smoothing=0.1, z_loss=1e-4),
        2, (90,), True,
    ),
    "loss, float32": (lambda: loss_launches(F32), 2, (80, 90), False),
    "decoding, 128 wide": (lambda: decode_launches(128, BF16), 2, (80, 90, 100), False),
    "decoding a layer of a stack, ALiBi": (
        lambda: decode_launches(
            128, BF16, layers=(4,), layer=2, alibi_slopes=jnp.linspace(0.1, 1, 32)
        ),
        2, (80, 90, 100), False,
    ),
    "decoding, 64 wide, float32": (lambda: decode_launches(64, F32), 2, (90,), False),
}  # fmt: skip


@pytest.fixture
def triton_cache(monkeypatch, tmp_path):
    """Compiled afresh; jax-triton empties this variable for the whole process."""
    pytest.importorskip("triton", reason="the compile gate needs triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, capability) for name, program in PROGRAMS.items() for capability in program[2]],
)
def test_compiles_without_spilling(triton_cache, name, capability):
    launches, count, _, hopper = PROGRAMS[name]
    made = launches()
    assert len(made) == count
    for launch in made:
        report = compiling.compiled(launch, capability)
        told = (launch.name, report._replace(ptx=""))
        assert report.spills == report.stack == 0, told
        assert report.shared <= SHARED_LIMIT[capability], told
        if hopper and capability == 90:
            assert report.wgmma > 0, told


def test_nothing_as_large_as_the_logits_is_asked_for():
    """Inputs and outputs of the loss's launches stay linear in the rows and in the vocabulary."""
    pytest.importorskip("triton", reason="recording launches needs triton")
    rows, width, vocab = 8192, 2304, 256_000
    for options in ({}, {"deterministic": True}):
        for launch in loss_launches(BF16, rows=rows, width=width, vocab=vocab, **options):
            arrays = [x for x in (*launch.inputs, *launch.outputs) if not isinstance(x, int)]
            assert max(x.size for x in arrays) <= vocab * width
            assert not any(x.shape == (rows, vocab) for x in arrays)


def test_lowered_through_jax_triton_with_ptx_inside():
    pytest.importorskip("jax_triton", reason="the lowering gate needs jax-triton and a CUDA plugin")
    query = jax.ShapeDtypeStruct((2, 300, 4, 64), BF16)
    key = jax.ShapeDtypeStruct((2, 300, 2, 64), BF16)

    def loss(query, key, value):
        out = kernels.lambda_attention(
            query, key, value, num_global=3, window_size=100, implementation="triton"
        )
        return out.astype(jnp.float32).sum()

    assert _kernels_in(jax.grad(loss, (0, 1, 2)), query, key, key) == [
        "forward", "gradient_of_keys", "gradient_of_keys", "gradient_of_queries",
    ]  # fmt: skip

    def mapped(query, key, value):  # the batch axis is the mapped one
        return jax.vmap(lambda q, k, v: loss(q[None], k[None], v[None]))(query, key, value).sum()

    assert _kernels_in(mapped, query, key, key) == ["forward"]
    rows = jax.ShapeDtypeStruct((100, 64), BF16)
    classifier = jax.ShapeDtypeStruct((1000, 64), BF16)
    call = functools.partial(kernels.linear_cross_entropy, implementation="triton")
    labels = jax.ShapeDtypeStruct((100,), jnp.int32)
    assert _kernels_in(jax.grad(call, (0, 1)), rows, classifier, labels) == [
        "gradients", "statistics",
    ]  # fmt: skip


def _kernels_in(function, *shapes) -> list[str]:
    """Names of the kernels whose PTX is in the program for Hopper."""
    with compat.lowering_for(90):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    calls = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            if attributes["call_target_name"].value == "triton_kernel_call":
                calls.append(attributes["backend_config"].value_bytes)
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    visit(inner.operation)

    visit(lowered.compiler_ir().operation)
    names = []
    for call in calls:
        text = zlib.decompress(call)
        assert b".target sm_90a" in text
        found = re.search(rb"\.visible \.entry (\w+)\(", text)
        assert found is not None
        names.append(found[1].decode())
    return sorted(names)


def test_refused_where_there_is_no_gpu():
    """The reason is told, and the next implementation serves the call."""
    query = jnp.zeros((1, 4, 1, 8))
    options = {"num_global": 0, "window_size": 2}
    with pytest.raises(ExceptionGroup, match="no implementation") as caught:
        kernels.lambda_attention(query, query, query, implementation="triton", **options)
    assert "needs a GPU" in str(caught.value.exceptions[0])

    def attend(query):
        return kernels.lambda_attention(
            query, query, query, implementation=("triton", "xla_chunked"), **options
        )

    (decision,) = kernels.explain(attend, query)
    assert decision.chosen == "xla_chunked"
    assert "needs a GPU" in decision.refused["triton"]
