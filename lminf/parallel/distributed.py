"""Joining the processes of one run, before JAX starts its devices."""

import os
from dataclasses import dataclass
from typing import Annotated

import jax

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range


@dataclass(frozen=True)
class Distributed:
    """Who takes part. A count of 1 is this process alone; 0 asks the cluster (TPU pod, SLURM, GKE,
    Open MPI), which JAX recognises by its environment."""

    count: Annotated[int, Range(min=0, max=2**20)] = 1
    index: Annotated[int, Range(min=0, max=2**20)] = 0  # of this process
    coordinator: str = ""  # host:port of process 0

    def __post_init__(self):
        ranges.check(self)
        if self.count > 1 and (self.index >= self.count or ":" not in self.coordinator):
            raise InputError(
                f"processes: index={self.index} of count={self.count} at coordinator="
                f"{self.coordinator!r}; give every process its own index from 0, and all of them "
                f"the host:port of process 0"
            )
        if self.count < 2 and (self.index or self.coordinator):
            alone = "this process is alone" if self.count else "the cluster says who takes part"
            raise InputError(
                f"processes: index={self.index} and coordinator={self.coordinator!r} with count="
                f"{self.count}: {alone}; leave them out, or give the count of processes"
            )

    def join(self) -> None:
        """Returns once all are there. Must come before anything that asks JAX for its devices."""
        if self.count == 1:
            return
        if self.count == 0:
            try:
                jax.distributed.initialize()
            except (ValueError, RuntimeError) as error:
                raise InputError(
                    f"processes.count=0 asks the cluster who takes part, and none is recognised "
                    f"here ({error}); give the count, index and coordinator"
                ) from error
            return
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(self.coordinator, self.count, self.index)
