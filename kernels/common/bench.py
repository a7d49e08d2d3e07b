"""Timing several programs in one run, interleaved, and what the machine could do at best."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median_ms: float
    min_ms: float
    iqr_ms: float
    repeats: int


def summary(seconds: list[float], calls: int = 1) -> Timing:
    """Timings of `calls` calls each, as milliseconds of one."""
    each = [1e3 * s / calls for s in seconds]
    low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return Timing(statistics.median(each), min(each), high - low, len(each))


def interleaved(
    programs: Mapping[str, Callable[[int], Any]],
    *,
    repeats: int,
    warmup: int = 1,
    budget_s: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every repeat of every program, taken in turns: what disturbs the machine for a
    while disturbs all of them. A program takes the number of the repeat, to choose its inputs, and
    returns when its result is there; if it returns a float, that is its time. Once a program has
    had its budget and three repeats, it sits out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(-warmup, repeats):
        for name, program in programs.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > budget_s:
                continue
            started = time.perf_counter()
            result = program(repeat)
            elapsed = result if isinstance(result, float) else time.perf_counter() - started
            if repeat >= 0:
                seconds[name].append(elapsed)
    return seconds


def blocking(fn: Callable, inputs: list[tuple]) -> Callable[[int], Any]:
    """A program that runs jitted `fn` on one of `inputs`, in turn, to its end."""
    return lambda repeat: jax.block_until_ready(fn(*inputs[repeat % len(inputs)]))


def chained(fn: Callable, inputs: list[tuple]) -> Callable[[int], Any]:
    """A program that runs `fn` on all of `inputs` inside one jit, each call after the one before:
    a step of microseconds is then not measured as the time to launch it. The first argument is an
    array; it receives 0 times the result before, which a compiler may not drop.
    """

    def run(inputs):
        last = jnp.float32(0)
        for first, *rest in inputs:
            out = fn(first + (0 * last).astype(first.dtype), *rest)
            last = jax.tree.leaves(out)[0].astype(jnp.float32).mean()
        return last

    compiled = jax.jit(run)
    return lambda repeat: jax.block_until_ready(compiled(inputs))


def gemm_tflops(dtype: Any, size: int, *, repeats: int = 5) -> float:
    """The best rate of a square matrix product of this dtype, TFLOP/s."""
    rng = np.random.default_rng(0)
    inputs = [
        tuple(jnp.asarray(rng.standard_normal((size, size)), dtype) for _ in range(2))
        for _ in range(2)
    ]
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype))
    seconds = interleaved({"gemm": blocking(product, inputs)}, repeats=repeats, warmup=2)
    return 2 * size**3 / min(seconds["gemm"]) / 1e12


def copy_tbps(megabytes: int, *, repeats: int = 5) -> float:
    """The best rate of reading and writing one large array, TB/s of both together."""
    count = megabytes * 250_000
    # In its own place: a fresh array costs a CPU more in page faults than the copy takes.
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    buffers = [jnp.asarray(np.random.default_rng(0).random(count), jnp.float32)]

    def copy(repeat: int) -> None:
        buffers.append(jax.block_until_ready(negate(buffers.pop())))

    seconds = interleaved({"copy": copy}, repeats=repeats, warmup=2)
    return 8 * count / min(seconds["copy"]) / 1e12
