"""Λ-attention for Hopper, compiled for an H100: what its assembler reports of the kernel.

Of the numbers this proves nothing; only a GPU can.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lminf import kernels
from lminf.kernels.common import aot, compat, launch
from lminf.kernels.lambda_attention import mosaic_gpu


class Report(NamedTuple):
    """What the compilers said of a program that has the kernel once."""

    temp_bytes: int
    stack_bytes: int
    spilled_bytes: int
    remarks: list[str]  # of products that are serialised, or registers that are not handed over
    products: int  # instructions of the matrix units
    loads: int  # instructions of the copy engine that read global memory


@pytest.fixture
def compile_report(monkeypatch, capfd):
    """Mosaic prints the kernel's PTX, and its assembler's report, past Python."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compiled(fn, *shapes) -> Report:
        capfd.readouterr()
        with compat.lowering_for(90):
            program = aot.compile_gpu(fn, *shapes)
        text = "".join(capfd.readouterr())
        assert text.count(".visible .entry lambda_attention_forward") == 1
        stack, stores, loads = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )[0]
        return Report(
            program.memory_analysis().temp_size_in_bytes,
            int(stack),
            int(stores) + int(loads),
            re.findall(r".*(?:Performance Loss|setmaxnreg.*ignored).*", text),
            text.count("wgmma.mma_async"),
            text.count("cp.async.bulk.tensor.5d.shared::cluster.global"),
        )

    return compiled


def shapes(length, heads, key_heads, width, *, keys=None, value_width=None, dtype=jnp.bfloat16):
    keys, value_width = keys or length, value_width or width
    return [
        jax.ShapeDtypeStruct((2, *shape), dtype)
        for shape in (
            (length, heads, width), (keys, key_heads, width), (keys, key_heads, value_width),
        )
    ]  # fmt: skip


def attend(**options):
    return functools.partial(
        kernels.lambda_attention, implementation="mosaic_gpu", return_residuals=True, **options
    )


def assert_clean(report: Report) -> None:
    assert (report.stack_bytes, report.spilled_bytes, report.remarks) == (0, 0, [])
    assert report.products > 0
    assert report.loads > 0


def test_compiles_clean_at_131072_tokens(compile_report):
    """Beside inputs and outputs only the globals are copied, to a multiple of 8 rows."""
    report = compile_report(attend(num_global=100, window_size=4096), *shapes(131072, 32, 8, 128))
    assert_clean(report)
    # Three loops (masked globals, inside the window, its edge), each with 8 + 8 products: as there
    # are fewer globals than a block has rows, the compiler drops the loop over whole blocks.
    assert report.products == 48
    assert report.temp_bytes <= 2e6


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (shapes(1003, 8, 1, 128), {"num_global": 7, "window_size": 77}),
        (shapes(37, 4, 4, 128), {"num_global": 0, "window_size": 5}),
        (shapes(130, 4, 2, 64, keys=700), {"num_global": 300, "query_offset": 570}),
        (shapes(1024, 8, 2, 128, value_width=64), {"num_global": 1024, "window_size": 1}),
        (shapes(1024, 8, 2, 64, value_width=128), {"num_global": 4}),
        (shapes(1024, 8, 2, 128, dtype=jnp.float16), {"num_global": 4}),
        (shapes(1024, 8, 2, 128), {"num_global": 0, "window_size": 2048}),
        (shapes(1024, 8, 2, 128), {"config": mosaic_gpu.Config(64, 3)}),
    ],
)
def test_compiles_clean(compile_report, inputs, options):
    options = {"num_global": 4, "window_size": 256} | options
    assert_clean(compile_report(attend(**options), *inputs))


def test_under_vmap_and_jit_with_a_traced_offset(compile_report):
    """A mapped axis joins the batch."""

    def fn(offset, *arrays):
        return jax.vmap(attend(num_global=4, window_size=100, query_offset=offset))(*arrays)

    mapped = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes(256, 4, 2, 64)]
    assert_clean(compile_report(fn, jax.ShapeDtypeStruct((), jnp.int32), *mapped))


def test_gradients_are_those_of_triton(compile_report):
    """The kernel forward, once; Triton's kernels, which have gates of their own, backward."""

    def loss(*arrays):
        out, lse = attend(num_global=4, window_size=100)(*arrays)
        return out.astype(jnp.float32).sum() + lse.sum()

    with launch.recording() as launches:
        report = compile_report(jax.value_and_grad(loss, (0, 1, 2)), *shapes(256, 4, 2, 64))
    assert_clean(report)
    assert [x.name for x in launches] == [
        "lambda_attention_query_gradients",
        *["lambda_attention_key_gradients"] * 2,  # of the window, of the globals
    ]
