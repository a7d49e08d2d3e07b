"""Devices that are not here but whose compiler is: programs can be built for them, not run.

The compiler of TPUs, libtpu, comes with the extra `aot`.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from lminf.parallel.hardware import Devices

AXES = {"v5e": 2, "v6e": 2, "v5p": 3}  # of a slice's grid of chips


def missing(devices: Devices) -> str | None:
    """Why nothing can be compiled for these devices here; None if it can."""
    if devices.name in AXES:
        if importlib.util.find_spec("libtpu") is None:
            return f"the compiler of {devices.name} is not installed: pip install 'lminf[aot]'"
        if devices.count < 4 or devices.count & (devices.count - 1):
            return f"slices of {devices.name} have 4, 8, 16, … chips, not {devices.count}"
        return None
    known = ", ".join(AXES)
    return f"no compiler for {devices.name} can be run here; there are those of {known}"


def devices(requested: Devices) -> Sequence[Any]:
    """As many devices of a topology; they hold no memory and run nothing."""
    # Otherwise libtpu asks a cloud machine's metadata server which chips it has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    grid = "x".join(map(str, grid_of(requested.count, AXES[requested.name])))
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{requested.name}:{grid}"
    ).devices


def grid_of(count: int, axes: int) -> tuple[int, ...]:
    """The most even grid of a power of two, its long sides last: 128 chips are 8 x 16."""
    exponent = round(math.log2(count))
    if axes == 3 and exponent == 2:
        return 2, 2, 1  # the chips of one host
    return tuple(2 ** ((exponent + axis) // axes) for axis in range(axes))
