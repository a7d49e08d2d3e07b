"""Kernel launches carried out by the Triton interpreter, on a CPU, as part of a JAX program.

For tests: with `launch.using(interpret.run)` a Triton implementation computes real numbers without
a GPU, grids, strides, padding, gradients and vmap included. Triton must have been imported with
TRITON_INTERPRET=1 in the environment, so such tests need a process of their own.
"""

# torch and triton are needed by these tests only.
# pyright: reportMissingImports=false

import functools
import math

import jax
import numpy as np
from jaxtyping import Array

from lminf.kernels.common.launch import Launch

POISON = 0x7F  # every byte: a NaN in bfloat16, 3e38 in float32


@functools.cache
def _mend() -> None:
    """Repairs two things in the interpreter of Triton 3.6.

    It keeps scalars as arrays of one element, which numpy 2.4 no longer turns into a loop bound;
    and its matrix product takes the bits of bfloat16 for integers.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype.scalar.name != "bf16" or x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32
        )

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )


def run(launch: Launch) -> tuple[Array, ...]:
    """The kernel's outputs, computed when the JAX program runs."""
    is_array = [not isinstance(x, int) for x in launch.inputs]
    arrays = [x for x, array in zip(launch.inputs, is_array, strict=True) if array]
    numbers = [x for x, array in zip(launch.inputs, is_array, strict=True) if not array]
    call = functools.partial(_interpret, launch, is_array, numbers)
    # Only what the kernel is and how it is called may be kept, no tracer of the call.
    return tuple(jax.pure_callback(call, tuple(launch.outputs), *arrays))


def _interpret(launch: Launch, is_array, numbers, *arrays):
    _mend()
    arrays, numbers = iter(arrays), iter(numbers)
    inputs = [_to_torch(np.array(next(arrays))) if a else next(numbers) for a in is_array]
    outputs = [
        _poisoned(x, 0 if i in launch.zeroed else POISON) for i, x in enumerate(launch.outputs)
    ]
    launch.kernel[launch.grid](
        *inputs, *outputs, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
    )
    return tuple(_to_numpy(x, o) for x, o in zip(outputs, launch.outputs, strict=True))


def _poisoned(like: jax.ShapeDtypeStruct, byte: int):
    import torch

    size = math.prod(like.shape) * np.dtype(like.dtype).itemsize
    raw = torch.full((size,), byte, dtype=torch.uint8)
    return raw.view(_torch_dtype(like.dtype)).reshape(like.shape)


def _torch_dtype(dtype):
    import torch

    return getattr(torch, np.dtype(dtype).name)


def _to_torch(x: np.ndarray):
    """torch does not read numpy's bfloat16, so the bytes travel."""
    import torch

    flat = torch.from_numpy(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return flat.view(_torch_dtype(x.dtype)).reshape(x.shape)


def _to_numpy(x, like: jax.ShapeDtypeStruct) -> np.ndarray:
    import torch

    raw = x.reshape(-1).view(torch.uint8).numpy()
    return raw.view(like.dtype).reshape(like.shape)
