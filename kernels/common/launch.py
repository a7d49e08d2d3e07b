"""A Triton kernel call as a value, and who carries it out.

The launchers of the kernels build a `Launch` and never ask who runs it: jax-triton on a GPU, the
Triton interpreter in a test, or a list that remembers it so that `triton.compile` can be given the
very shapes, tiles and constants that would run.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lminf.kernels.common import compat


@dataclass(frozen=True)
class Launch:
    """One call of a kernel whose parameters are, in order: inputs, outputs, named constants."""

    kernel: Any  # a function under @triton.jit
    grid: tuple[int, ...]  # programs
    inputs: Sequence[Array | int]
    outputs: Sequence[jax.ShapeDtypeStruct]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    zeroed: tuple[int, ...] = ()  # outputs that must hold zeros when the kernel starts
    name: str = field(default="")


Runner = Callable[[Launch], tuple[Array, ...]]

_runner: contextvars.ContextVar[Runner | None] = contextvars.ContextVar("launcher", default=None)


@contextlib.contextmanager
def using(runner: Runner) -> Iterator[None]:
    """Launches traced inside the block go to `runner` instead of a GPU."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches traced inside the block; their results are zeros."""
    launches: list[Launch] = []

    def remember(launch: Launch) -> tuple[Array, ...]:
        launches.append(launch)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs)

    with using(remember):
        yield launches


def require() -> None:
    """NotImplementedError, with the reason, where no Triton kernel can be launched."""
    if _runner.get() is None:
        compat.require_triton()


def refuse_operands(arrays: Sequence[Array], scale: float, *, widest: int, float32: int) -> None:
    """NotImplementedError for arrays of other dtypes, or of wider heads (in float32) than these."""
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) > 1:
        raise NotImplementedError(f"operands of different dtypes: {sorted(map(str, dtypes))}")
    (dtype,) = dtypes
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"operands in {dtype}")
    width, widest = max(x.shape[-1] for x in arrays), float32 if dtype == jnp.float32 else widest
    if width > widest:
        raise NotImplementedError(f"{dtype} heads {width} wide; it takes up to {widest}")
    if scale <= 0:
        raise NotImplementedError(f"scale={scale}: the running maximum needs a positive one")


def padded(size: int) -> int:
    """The side of a tile: Triton takes powers of two, and a matrix product at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def run(launch: Launch) -> tuple[Array, ...]:
    """The kernel's outputs."""
    return (_runner.get() or compat.triton_call)(launch)


def folding_batches(function: Callable) -> Callable:
    """`function`, whose arguments and results all lead with a batch axis, under vmap as well.

    jax-triton has no batching rule; here the mapped axis joins the batch axis.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *arguments):
        def fold(x, batched):
            if not batched:
                x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = mapped(*jax.tree.map(fold, arguments, tuple(in_batched)))
        apart = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return apart, jax.tree.map(lambda _: True, apart)

    return mapped
