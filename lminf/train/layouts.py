"""Where a training step runs and in which pieces, and the bytes that it then takes on a device.

A layout is what `lminf plan --search` searches over: a mesh, the strategy on it, rows at a time,
what the backward computes again, and the order of passes where layers are spread over stages.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lminf.models import decoder
from lminf.parallel import mesh, partition
from lminf.parallel.mesh import MeshShape
from lminf.train import planning
from lminf.train.step import REMAT, TrainStep


@dataclass(frozen=True)
class Schedule:
    """An order of the passes of m micro-batches through a pipeline of p stages."""

    # (p, m) -> idle time as a share of the time that a device works
    bubble: Callable[[int, int], float]
    # (p, m) -> micro-batches whose activations the first device holds of its layers, at most
    in_flight: Callable[[int, int], float]
    chunks: int = 1  # runs of layers on a device, each a stage of its own
    spreads_vocabulary: bool = False  # embedding and head lie in slices on all stages


# GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B and its interleaved form: Narayanan et al. 2021,
# arXiv:2104.04473; the latter's activations: Korthikanti et al. 2022, arXiv:2205.05198, section
# 4.2.3. Vocabulary parallelism with one barrier: Yeung et al. 2024, arXiv:2411.05288.
SCHEDULES = {
    "gpipe": Schedule(lambda p, m: (p - 1) / m, lambda p, m: m),
    "1f1b": Schedule(lambda p, m: (p - 1) / m, lambda p, m: min(p, m)),
    "1f1b_interleaved": Schedule(
        lambda p, m: (p - 1) / (2 * m), lambda p, m: min(p, m) * (1 + (p - 1) / (2 * p)), chunks=2
    ),
    "1f1b_vocab": Schedule(
        lambda p, m: (p - 1) / m, lambda p, m: min(p + 1, m), spreads_vocabulary=True
    ),
}
NO_PIPELINE = Schedule(lambda p, m: 0.0, lambda p, m: 1)

# What a compiled step takes beside its state and gradients, over the activations of the formula:
# 1.3 to 2.1 in six steps compiled for eight CPU devices (4 and 8 layers of width 256, rows of 64
# and 128 tokens; docs/planning.md). CPU attention also keeps scores, which these rows are too short
# to show.
MEASURED_ACTIVATIONS = 1.4


@dataclass(frozen=True)
class Layout:
    sizes: MeshShape  # none is -1
    strategy: str
    micro_batch: int  # rows that a replica works on at a time
    accumulation: int  # micro-batches of a step
    remat: str
    schedule: str = ""  # of SCHEDULES; empty where there is one stage

    @property
    def devices(self) -> int:
        return math.prod(getattr(self.sizes, axis) for axis in mesh.AXES)

    @property
    def passes(self) -> Schedule:
        return SCHEDULES[self.schedule] if self.schedule else NO_PIPELINE

    @property
    def overrides(self) -> tuple[str, ...]:
        """Fields of a `train_lm` config that ask for this layout."""
        sizes = (f"mesh.{axis}={size}" for axis, size in asdict(self.sizes).items())
        return (
            *sizes, f"strategy={self.strategy}", f"grad_accum_steps={self.accumulation}",
            f"remat={self.remat}",
        )  # fmt: skip

    def of(self, program: TrainStep) -> TrainStep:
        """The program, laid out so on devices that need not be here."""
        return on_mesh(
            program, self.sizes, self.strategy,
            remat=self.remat, grad_accum_steps=self.accumulation,
        )  # fmt: skip


def on_mesh(program: TrainStep, sizes: MeshShape, strategy: str, **changes: Any) -> TrainStep:
    """The program on another mesh, whose devices need not be here."""
    devices = math.prod(asdict(sizes).values())
    laid_out = mesh.absent(sizes, devices)
    elsewhere = replace(program, mesh=laid_out, strategy=partition.parse(strategy), **changes)
    # Shapes are the same anywhere, and tracing them takes longer than all else about a layout.
    vars(elsewhere)["shapes"] = program.shapes
    return elsewhere


@dataclass(frozen=True)
class ShardedBytes:
    """Bytes and channels that layouts of equal fsdp, tensor and expert sizes have in common."""

    # Bytes on a device of (weights, gradients, the optimizer's state with master parameters).
    layers: np.ndarray
    vocabulary: np.ndarray  # embedding and head
    other_params: np.ndarray
    weights: float  # bytes of all layers as a device multiplies by them: not in slices of fsdp
    shards_weights: bool
    shards_grads: bool
    # By remat: channels of a token that a layer keeps, and that the layer at work has besides.
    channels: Mapping[str, tuple[float, float]]


def sharded_bytes(program: TrainStep, sizes: MeshShape, strategy: str) -> ShardedBytes:
    """The bytes that layouts with these sizes of fsdp, tensor and expert share."""
    sizes = replace(sizes, data=1, context=1, stage=1)
    made = on_mesh(program, sizes, strategy, grad_accum_steps=1)
    state, laid_out = made.shapes, made.shardings
    groups = {name: np.zeros(3) for name in ("layers", "vocabulary", "other_params")}
    for part, shapes, shardings in (
        (0, (state.params, state.frozen), (laid_out.params, laid_out.frozen)),
        (1, state.params, made.gradient_shardings),
        (2, (state.master_params, state.optimizer), (laid_out.master_params, laid_out.optimizer)),
    ):
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
            group = group_of(partition.path_of(path))
            groups[group][part] += partition.planned_bytes([leaf], [sharding])
    layers = {name: x for name, x in state.params.items() if name.endswith("layers")}
    rules = tuple(rule for rule in made.strategy.params if rule[1] != "fsdp")
    shardings_without_fsdp = partition.shardings(layers, decoder.AXES, rules, made.mesh)
    return ShardedBytes(
        **groups,
        weights=float(partition.planned_bytes(layers, shardings_without_fsdp)),
        shards_weights=shards_fsdp(made.strategy.params),
        shards_grads=shards_fsdp(made.strategy.grads),
        channels={
            remat: planning.activation_channels(replace(made, remat=remat)) for remat in REMAT
        },
    )


def group_of(path: str) -> str:
    names = set(path.split("/"))
    if names & {"layers", "first_layers"}:
        return "layers"
    return "vocabulary" if names & {"embed", "head"} else "other_params"


def shards_fsdp(rules: partition.Rules) -> bool:
    return any(axis == "fsdp" for _, axis in rules)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, of the stage that has most."""

    params: float
    grads: float
    optimizer: float  # with the float32 master parameters
    activations: float
    gathered: float  # weights of the layer at work and of the next, where ZeRO-3 gathers them

    @property
    def total(self) -> float:
        return self.params + self.grads + self.optimizer + self.activations + self.gathered


def memory(layout: Layout, sharded: ShardedBytes, program: TrainStep, *, length: int) -> Memory:
    """What one device holds in a step."""
    spec, itemsize = program.spec, jnp.dtype(program.dtype).itemsize
    stages, passes, count = layout.sizes.stage, layout.passes, layout.accumulation
    vocabulary = 1.0
    if stages > 1:
        vocabulary = 1.0 if spec.tied else 0.5  # each end has one of the two
        vocabulary = 1 / stages if passes.spreads_vocabulary else vocabulary
    params, grads, optimizer = (
        sharded.layers / stages + vocabulary * sharded.vocabulary + sharded.other_params
    )
    if count > 1:  # pieces are added in float32
        grads *= 4 / itemsize
    kept, working = sharded.channels[layout.remat]
    tokens = layout.micro_batch * length / layout.sizes.context
    in_flight = passes.in_flight(stages, count) * spec.num_layers / stages
    gathered = 0.0
    if sharded.shards_weights and layout.sizes.fsdp > 1:
        gathered = 2 * sharded.weights / spec.num_layers
    activations = tokens * (in_flight * kept + working) * itemsize * MEASURED_ACTIVATIONS
    return Memory(float(params), float(grads), float(optimizer), activations, gathered)
