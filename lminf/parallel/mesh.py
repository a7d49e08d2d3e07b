"""The mesh: the only place where devices get names. Its axes are always the same six.

data      whole copies of the model, other rows of the batch
fsdp      other rows of the batch, and slices of what a ZeRO stage slices
tensor    heads, MLP channels and vocabulary of one copy
context   positions of a row
expert    experts of a mixture
stage     layers of a pipeline
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeAlias, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
Size: TypeAlias = Annotated[int, Range(min=-1, max=2**20)]  # devices; 0 is refused too
REST = -1  # as the size of one axis: the devices that the others leave


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; -1 for one of them takes what the others leave."""

    data: Size = REST
    fsdp: Size = 1
    tensor: Size = 1
    context: Size = 1
    expert: Size = 1
    stage: Size = 1

    def __post_init__(self):
        ranges.check(self)
        for axis, size in asdict(self).items():
            if size < 1 and size != REST:
                raise ValueError(f"mesh.{axis}={size}; give 1 or more devices, or -1 for the rest")
        if list(asdict(self).values()).count(REST) > 1:
            raise ValueError("two axes of the mesh are -1; only one can take the rest")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along each of AXES, where there are `devices` in all."""
        given = asdict(self)
        named = math.prod(size for size in given.values() if size != REST)
        requested = " x ".join(f"{axis}={size}" for axis, size in given.items() if size not in (1,))
        if named > devices:
            raise InputError(
                f"the mesh {requested} needs {named} devices and there are {devices}; "
                f"make an axis smaller"
            )
        if devices % named:
            raise InputError(
                f"the mesh {requested} does not divide {devices} devices; choose axes whose "
                f"product divides {devices}"
            )
        return tuple(devices // named if size == REST else size for size in given.values())


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or the given ones; without a -1 it may leave some unused."""
    everything = list(jax.devices() if devices is None else devices)
    sizes = shape.sizes(len(everything))
    used = math.prod(sizes)
    if used < len(everything) and jax.process_count() > 1:
        raise InputError(
            f"the mesh uses {used} of {len(everything)} devices, so some processes would have "
            f"nothing to do; let one axis be -1"
        )
    # Auto: jit chooses the collectives from the shardings of its arguments and results.
    kinds = (AxisType.Auto,) * len(AXES)
    if devices is None and used == len(everything):
        return jax.make_mesh(sizes, AXES, axis_types=kinds)  # knows the network between TPUs
    return Mesh(np.array(everything[:used]).reshape(sizes), AXES, axis_types=kinds)


def absent(shape: MeshShape, devices: int) -> Mesh:
    """The mesh over so many devices that are not here: for plans, which read its shape only."""
    kinds = (AxisType.Auto,) * len(AXES)
    return cast(Mesh, AbstractMesh(shape.sizes(devices), AXES, axis_types=kinds))


def single() -> Mesh:
    """A mesh of one device."""
    return make(MeshShape(data=1), jax.local_devices()[:1])
