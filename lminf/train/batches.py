"""What a step learns from: arrays by name, and the function of the step that gives them."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from lminf.errors import InputError
from lminf.parallel import partition
from lminf.parallel.partition import Strategy

# Arrays [B, ...] by name. Those of pretraining are [B, T]; `tokens` and `targets` are int32, the
# others may be left out:
#   weights    float32, how much each target counts           all 1
#   positions  int32, of the token in its document            0, 1, 2, …
#   segments   int32, which document of the row               one document a row
# Other objectives declare arrays of their own, such as chosen_tokens and rejected_tokens.
Batch: TypeAlias = Mapping[str, Array | np.ndarray]
OPTIONAL = ("weights", "positions", "segments")


class Batches(Protocol):
    """Training data. A batch is a pure function of its step: no iterator state, exact resume."""

    def batch(self, step: int) -> Batch:
        """The batch of a step: this process's share of its rows."""
        ...

    def documents(self, step: int) -> Sequence[int]:
        """Where all rows of that step come from, to be named when one of them does harm."""
        ...


class HostShard(NamedTuple):
    """Part number `process` of `processes` equal parts of a batch's rows."""

    process: int
    processes: int


WHOLE = HostShard(0, 1)


def share(mesh: Mesh, strategy: Strategy) -> HostShard:
    """The rows that this process's devices work on, which are all that it must read."""
    copies = _copies(mesh, strategy)
    where = partition.spec(("batch",), (copies,), strategy.activations, mesh)
    laid_out = NamedSharding(mesh, where).devices_indices_map((copies,))
    rows = {
        row
        for device, (part,) in laid_out.items()
        if device.process_index == jax.process_index()
        for row in range(copies)[part]
    }
    return _enclosing(rows, copies)


def _enclosing(rows: Set[int], of: int) -> HostShard:
    """The smallest equal part of `of` rows that holds these."""
    first, last = min(rows), max(rows)
    size = next(n for n in range(1, of + 1) if of % n == 0 and first // n == last // n)
    return HostShard(first // size, of // size)


def _copies(mesh: Mesh, strategy: Strategy) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(strategy))


def _axes(strategy: Strategy) -> list[str]:
    """Mesh axes over which the rows of a batch are divided."""
    return sorted({axis for logical, axis in strategy.activations if logical == "batch"})


def check(
    batch: Batch,
    *,
    mesh: Mesh,
    strategy: Strategy,
    pieces: int,  # grad_accum_steps, or the microbatches of a pipeline
    arrays: Sequence[str] = ("tokens", "targets"),
) -> None:
    """Refuses a batch that lacks one of `arrays`, or that the mesh cannot divide evenly."""
    prefixes = {name.removesuffix("tokens") for name in arrays if name.endswith("tokens")}
    allowed = {*arrays, *(prefix + name for prefix in prefixes for name in OPTIONAL)}
    if not set(arrays) <= set(batch) <= allowed:
        may = ", ".join(sorted(allowed - set(arrays)))
        raise InputError(
            f"a batch holds {sorted(batch)}; it must hold {', '.join(arrays)}"
            f"{f', and may hold {may}' if may else ''}"
        )
    copies = _copies(mesh, strategy)
    for name, array in batch.items():
        rows, *rest = array.shape
        if rows % (copies * pieces):
            raise InputError(
                f"a batch of {rows} rows does not divide into {pieces} x {copies} "
                f"(grad_accum_steps or microbatches x {' and '.join(_axes(strategy))} devices); "
                f"make the batch a multiple of {copies * pieces}"
            )
        if name.endswith(("tokens", "targets")) and rest[0] % mesh.shape["context"]:
            raise InputError(
                f"rows of {rest[0]} tokens do not divide over "
                f"mesh.context={mesh.shape['context']}; make the length a multiple of it"
            )


def put(
    batch: Batch, *, mesh: Mesh, strategy: Strategy, share: HostShard = WHOLE
) -> dict[str, Array]:
    """The whole batch on the mesh, of which `batch` is this process's share."""

    def one(x):
        x = np.asarray(x)
        shape = (x.shape[0] * share.processes, *x.shape[1:])
        axes = ("batch", "length", *[None] * x.ndim)[: x.ndim]
        where = partition.spec(axes, shape, strategy.activations, mesh)
        first_row = x.shape[0] * share.process

        def part(index):
            first, last, _ = index[0].indices(shape[0])
            return x[(slice(first - first_row, last - first_row), *index[1:])]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, where), part)

    return {name: one(x) for name, x in batch.items()}
