"""Compiling for accelerators that this machine does not have, and reading what the compiler says.

Needs the wheels of the `aot` extra; the compilers are the ones that the devices run. What comes
back is a compiled program that cannot be run here, but knows its memory and its text.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def compile_tpu(fn: Callable, *shapes: Any, topology: str = "v5e:2x2") -> jax.stages.Compiled:
    """`fn` compiled for each chip of a TPU slice, all chips doing the same.

    Mosaic kernels cannot be partitioned automatically, hence the shard_map. Set
    TPU_SKIP_MDS_QUERY=1, or libtpu asks a cloud machine's metadata server about its chips.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("chips",))
    everywhere = PartitionSpec()
    replicated = jax.shard_map(
        fn, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    return jax.jit(replicated).lower(*_placed(shapes, mesh)).compile()


def compile_gpu(
    fn: Callable, *shapes: Any, target: Literal["h100"] = "h100"
) -> jax.stages.Compiled:
    """`fn` compiled for one GPU."""
    mesh = Mesh(np.array(_gpu(target)), ("gpu",))
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*_placed(shapes, mesh)).compile()


@functools.cache
def _gpu(target: str):
    jax.devices()  # loads the plugin, which finds no GPU here and need not
    text = (Path(__file__).parent / f"{target}.txt").read_text()
    return topologies.get_topology_desc(
        "", platform="cuda", target_config=text, topology="1x1x1"
    ).devices


def _placed(shapes, mesh: Mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
