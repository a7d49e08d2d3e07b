"""The fastest layouts of a training step that fit on given devices, by layouts.py and step_time.py.

As in the search of Dash et al. 2023, arXiv:2312.12705, what does not fit is left out first.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from lminf.errors import InputError
from lminf.parallel import pipeline
from lminf.parallel.hardware import MOST_DEVICES, Devices
from lminf.parallel.mesh import MeshShape
from lminf.train import layouts, step_time
from lminf.train.layouts import SCHEDULES, Layout, Memory, ShardedBytes
from lminf.train.step import REMAT, TrainStep
from lminf.train.step_time import StepTime

USABLE = 0.9  # of a device's memory: the runtime and what falls between arrays take the rest
WIDEST_TENSOR = 16  # devices that a matrix is divided over, at most
SHORTEST_CONTEXT = 1024  # tokens of a row on a device, at least, where rows are divided
MICRO_BATCHES = (1, 2, 4, 8, 16)  # rows
ZEROS = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Planned:
    """A layout with the memory, time and MFU that it is estimated to have."""

    layout: Layout
    memory: Memory
    time: StepTime
    mfu: float

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts by time to 1 %, which is finer than the model of it, and then by memory."""
        return round(math.log(self.time.total) / math.log(1.01)), self.memory.total


@dataclass(frozen=True)
class Search:
    """A step over rows x length tokens on devices."""

    program: TrainStep  # its mesh, strategy, remat and accumulation are not read
    devices: Devices
    rows: int
    length: int
    efficiency: float  # share of the peak that products reach
    known: dict[tuple, ShardedBytes] = field(default_factory=dict)

    def best(self) -> list[Planned]:
        """The fastest layout of every mesh and strategy that fits, in the order of `Planned.rank`;
        InputError says why there is none.
        """
        fastest: dict[tuple, Planned] = {}
        smallest: tuple[float, Layout] | None = None
        for layout in self.layouts():
            taken = self.memory(layout)
            if smallest is None or taken.total < smallest[0]:
                smallest = taken.total, layout
            if taken.total > self.usable:
                continue
            planned = self.planned(layout, taken)
            key = layout.sizes, layout.strategy
            if key not in fastest or planned.rank < fastest[key].rank:
                fastest[key] = planned
        if smallest is None:
            raise InputError(self.nothing_divides())
        if not fastest:
            raise InputError(self.nothing_fits(*smallest))
        return sorted(fastest.values(), key=lambda planned: planned.rank)

    @property
    def usable(self) -> float:
        return USABLE * self.devices.kind.memory_bytes

    @cached_property
    def work(self) -> step_time.Work:
        return step_time.work_of(self.program, rows=self.rows, length=self.length)

    def sharded(self, layout: Layout) -> ShardedBytes:
        sizes = layout.sizes
        key = sizes.fsdp, sizes.tensor, sizes.expert, layout.strategy
        if key not in self.known:
            self.known[key] = layouts.sharded_bytes(self.program, sizes, layout.strategy)
        return self.known[key]

    def memory(self, layout: Layout) -> Memory:
        return layouts.memory(layout, self.sharded(layout), self.program, length=self.length)

    def planned(self, layout: Layout, taken: Memory) -> Planned:
        kind = self.devices.kind
        time = step_time.step_time(
            layout, self.sharded(layout), self.work, taken, kind, efficiency=self.efficiency
        )
        return Planned(layout, taken, time, step_time.mfu(time, layout, self.work, kind))

    # --- Candidates -------------------------------------------------------------------------------

    def layouts(self) -> Iterator[Layout]:
        """Every layout of the devices that divides the model and the batch evenly."""
        for sizes in self.meshes():
            replicas = sizes.data * sizes.fsdp * sizes.expert
            if self.rows % replicas:
                continue
            rows = self.rows // replicas
            for strategy in strategies(sizes):
                for micro_batch in (b for b in MICRO_BATCHES if rows % b == 0):
                    pieces = rows // micro_batch
                    for schedule in self.schedules(sizes.stage, pieces):
                        for remat in REMAT:
                            yield Layout(sizes, strategy, micro_batch, pieces, remat, schedule)

    def meshes(self) -> Iterator[MeshShape]:
        spec, most = self.program.spec, self.devices.count
        experts = spec.moe.experts if spec.moe else 1
        hidden = spec.moe.hidden_dim if spec.moe else spec.mlp.hidden_dim
        widest = min(WIDEST_TENSOR, self.devices.kind.domain)
        tensors = [t for t in divisors(most) if t <= widest
                   and spec.num_heads % t == 0 and hidden % t == 0]  # fmt: skip
        contexts = [
            c
            for c in divisors(most)
            if c == 1
            or (self.length % c == 0 and self.length // c >= SHORTEST_CONTEXT and not spec.sinks)
        ]
        for tensor in tensors:
            for context in contexts:
                for expert in (e for e in divisors(most) if experts % e == 0):
                    for stage in self.stages() if context == expert == 1 else [1]:
                        inner = tensor * context * expert * stage
                        if most % inner:
                            continue
                        for fsdp in divisors(most // inner):
                            yield MeshShape(
                                most // inner // fsdp, fsdp, tensor, context, expert, stage
                            )

    def stages(self) -> list[int]:
        """Of pipelines that train this program: more than one only where there are any."""
        spec = self.program.spec
        if pipeline.unsupported(spec) or self.program.lora is not None:
            return [1]
        return [p for p in divisors(self.devices.count) if spec.num_layers % p == 0]

    def schedules(self, stages: int, pieces: int) -> list[str]:
        """Those that lminf.parallel.pipeline runs with so many micro-batches."""
        if stages == 1:
            return [""]
        layers = self.program.spec.num_layers
        return [name for name, schedule in SCHEDULES.items()
                if schedule.pipeline and layers % (stages * schedule.chunks) == 0
                and schedule.divides(stages, pieces)]  # fmt: skip

    # --- Refusals ---------------------------------------------------------------------------------

    def nothing_divides(self) -> str:
        """Why no layout divides the model and the batch, and the nearest count that some divide."""
        count = self.devices.count
        near = next(
            (candidate for step in range(1, count + 1) for candidate in (count - step, count + step)
             if 0 < candidate <= MOST_DEVICES and self.on(candidate).divides),
            1,
        )  # fmt: skip
        spec = self.program.spec
        return (
            f"{count} devices divide neither {self.rows} rows of {self.length} tokens, nor "
            f"{spec.num_heads} heads, nor {spec.num_layers} layers, nor two of these together; "
            f"use {near} devices, or another batch"
        )

    @property
    def divides(self) -> bool:
        return next(self.layouts(), None) is not None

    def on(self, count: int) -> "Search":
        return replace(self, devices=Devices(self.devices.name, count))

    def nothing_fits(self, least: float, layout: Layout) -> str:
        """What the smallest layout takes, and how many devices would do."""
        name, count = self.devices.name, self.devices.count
        taken = (
            f"no layout fits: the smallest takes {least / 1e9:.1f} GB of the "
            f"{self.usable / 1e9:.1f} GB that a plan may use of each {name}"
        )
        while (count := 2 * count) <= MOST_DEVICES:
            more = self.on(count)
            if any(more.memory(layout).total <= more.usable for layout in more.small_layouts()):
                return f"{taken}; {name}x{count} would do"
        return (
            f"{taken} ({', '.join(layout.overrides)}), and doubling their number up to "
            f"{MOST_DEVICES:,} finds none; give a smaller model, or a batch that more of them "
            f"divide"
        )

    def small_layouts(self) -> Iterator[Layout]:
        """Of the layouts those that take least: everything sliced, one row at a time."""
        for sizes in self.meshes():
            replicas = sizes.data * sizes.fsdp * sizes.expert
            if self.rows % replicas == 0:
                strategy, pieces = strategies(sizes)[-1], self.rows // replicas
                for schedule in self.schedules(sizes.stage, pieces):
                    yield Layout(sizes, strategy, 1, pieces, "full", schedule)


def strategies(sizes: MeshShape) -> list[str]:
    """The strategies that use every axis of the mesh, none of which is 1 in vain."""
    axes = [axis for axis in ("tensor", "context", "expert") if getattr(sizes, axis) > 1]
    if sizes.fsdp > 1:
        return ["+".join([zero, *axes]) for zero in ZEROS]
    return ["+".join(axes) or "data"]


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
