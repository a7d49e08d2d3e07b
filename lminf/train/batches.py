"""What a step learns from: arrays by name, and the function of the step that gives them."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from lminf.errors import InputError
from lminf.parallel import partition
from lminf.parallel.partition import Strategy

# All [B, T]. `tokens` and `targets` are int32; the others may be left out:
#   weights    float32, how much each target counts           all 1
#   positions  int32, of the token in its document            0, 1, 2, …
#   segments   int32, which document of the row               one document a row
Batch: TypeAlias = Mapping[str, Array | np.ndarray]
NAMES = ("tokens", "targets", "weights", "positions", "segments")


class Batches(Protocol):
    """Training data. A batch is a pure function of its step: no iterator state, exact resume."""

    def batch(self, step: int) -> Batch:
        """The whole batch of a step, equal in every process."""
        ...

    def documents(self, step: int) -> Sequence[int]:
        """Where the rows of that batch come from, to be named when one of them does harm."""
        ...


def check(batch: Batch, *, mesh: Mesh, strategy: Strategy, accumulate: int) -> None:
    """Refuses a batch that the mesh cannot divide evenly."""
    unknown = set(batch) - set(NAMES)
    if unknown or not {"tokens", "targets"} <= set(batch):
        raise InputError(f"a batch holds {sorted(batch)}; it must hold tokens and targets, and may "
                         f"hold weights, positions and segments")  # fmt: skip
    rows, length = batch["tokens"].shape
    over = {axis for logical, axis in strategy.activations if logical == "batch"}
    copies = math.prod(mesh.shape[axis] for axis in over)
    if rows % (copies * accumulate):
        raise InputError(
            f"a batch of {rows} rows does not divide into {accumulate} x {copies} (accumulate x "
            f"{' and '.join(sorted(over))} devices); make the batch a multiple of "
            f"{copies * accumulate}"
        )
    if length % mesh.shape["context"]:
        raise InputError(
            f"rows of {length} tokens do not divide over mesh.context={mesh.shape['context']}; "
            f"make the length a multiple of it"
        )


def put(batch: Batch, *, mesh: Mesh, strategy: Strategy) -> dict[str, Array]:
    """The batch on the mesh; every process gives the devices it holds their part."""

    def one(x):
        x = np.asarray(x)
        where = partition.spec(("batch", "length"), x.shape, strategy.activations, mesh)
        sharding = NamedSharding(mesh, where)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return {name: one(x) for name, x in batch.items()}
