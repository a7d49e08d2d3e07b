"""A training step compiled for devices that are not here, and the memory that it would take."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lminf.kernels.common import platforms
from lminf.parallel import mesh, partition, topology
from lminf.parallel.hardware import Devices
from lminf.parallel.mesh import MeshShape
from lminf.train.step import TrainStep


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes, as the compiler laid the step out."""

    arguments: int  # the state and the batch
    working: int  # gradients, activations and everything in between, at its highest

    @property
    def total(self) -> int:
        return self.arguments + self.working


def memory(program: TrainStep, devices: Devices, *, rows: int, length: int) -> Memory:
    """What a step over `rows` x `length` tokens takes; `topology.missing` says where it cannot."""
    chips = topology.devices(devices)
    sizes = MeshShape(**program.mesh.shape)
    program = replace(program, mesh=mesh.make(sizes, chips))
    arguments = shapes_of(program, rows, length)
    step: Any = program.step  # jitted
    with platforms.assuming(chips[0]):
        return memory_of(step.lower(*arguments).compile())


def memory_of(compiled: Any) -> Memory:
    """What a compiled step (jax.stages.Compiled) takes."""
    analysis = compiled.memory_analysis()
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes + max(fresh, 0))


def shapes_of(program: TrainStep, rows: int, length: int) -> tuple[Any, Any]:
    """What the step is called with: the state and a batch, as shapes on the program's mesh."""

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    where = partition.spec(
        ("batch", "length"), (rows, length), program.strategy.activations, program.mesh
    )
    tokens = placed(
        jax.ShapeDtypeStruct((rows, length), jnp.int32), NamedSharding(program.mesh, where)
    )
    state = jax.tree.map(placed, program.shapes, program.shardings)
    return state, {"tokens": tokens, "targets": tokens}
