"""A training step compiled for devices that are not here, and the memory that it would take."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kernels.common import compat, platforms
from lminf.parallel import absent, mesh, partition
from lminf.parallel.hardware import Devices
from lminf.parallel.mesh import MeshShape
from lminf.train.step import Program

HOPPER = 90  # compute capability


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes, as the compiler laid the step out."""

    held: int  # the state and the batch
    working: int  # gradients, activations and everything in between, at its highest

    @property
    def total(self) -> int:
        return self.held + self.working


def memory(program: Program, devices: Devices, *, rows: int, length: int) -> Memory:
    """What a step over `rows` x `length` tokens takes; `absent.missing` says where it cannot."""
    chips = absent.devices(devices)
    sizes = MeshShape(**program.mesh.shape)
    program = replace(program, mesh=mesh.make(sizes, chips))
    with ExitStack() as stack:
        stack.enter_context(platforms.assuming(chips[0]))
        if devices.name == "h100":
            stack.enter_context(compat.lowering_for(HOPPER))
            stack.enter_context(jax.set_mesh(program.mesh))
        found: Any = lowered(program, rows, length).compile().memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + max(fresh, 0))


def lowered(program: Program, rows: int, length: int) -> jax.stages.Lowered:
    """The step of fresh shapes, on the mesh of the program."""

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    where = partition.spec(
        ("batch", "length"), (rows, length), program.strategy.activations, program.mesh
    )
    tokens = placed(
        jax.ShapeDtypeStruct((rows, length), jnp.int32), NamedSharding(program.mesh, where)
    )
    state = jax.tree.map(placed, program.shapes, program.shardings)
    step: Any = program.step  # jitted
    return step.lower(state, {"tokens": tokens, "targets": tokens})
