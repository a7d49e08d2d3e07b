"""The machine code of a recorded launch, and what ptxas says about it."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lminf.kernels.common.launch import Launch

NAMES = {
    "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int8": "*i8",
}  # fmt: skip


class Report(NamedTuple):
    """What one kernel costs on one GPU."""

    registers: int  # of a thread
    spills: int  # bytes, stores and loads
    stack: int  # bytes
    shared: int  # bytes of a block
    wgmma: int  # instructions
    ptx: str


def compiled(launch: Launch, capability: int) -> Report:
    """The launch compiled as jax-triton would: buffers aligned to 16 bytes, numbers at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = [*launch.inputs, *launch.outputs]
    names = launch.kernel.arg_names[: len(arguments)]
    constants = dict(launch.constants)
    signature, attributes = {}, {}
    for i, (name, x) in enumerate(zip(names, arguments, strict=True)):
        if isinstance(x, int):
            signature[name] = "i32"
            if x == 1:
                constants[name] = 1
        else:
            signature[name] = NAMES[np.dtype(x.dtype).name]
            attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
    )
    ptx = made.asm["ptx"]
    return Report(*_usage(ptx, capability), made.metadata.shared, ptx.count("wgmma.mma_async"), ptx)


def _usage(ptx: str, capability: int) -> tuple[int, int, int]:
    """(registers, bytes spilled, bytes of stack) from ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = "sm_90a" if capability == 90 else f"sm_{capability}" + "a" * (capability >= 100)
        done = subprocess.run(
            [_ptxas(capability), "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stdout + done.stderr
    numbers: Any = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    registers: Any = re.search(r"Used (\d+) registers", said)
    stack, stores, loads = (int(x) for x in numbers.groups())
    return int(registers[1]), stores + loads, stack


@functools.cache
def _ptxas(capability: int) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = tools / "ptxas-blackwell"
    return str(newer if capability >= 100 and newer.exists() else tools / "ptxas")


def launches_of(function, *shapes) -> list[Launch]:
    """The launches that tracing `function` asks for."""
    from lminf.kernels.common import launch

    with launch.recording() as found:
        jax.eval_shape(lambda *x: function(*x), *shapes)
    return found
