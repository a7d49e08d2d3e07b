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
from lminf.parallel import mesh, partition, pipeline
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
    # Of lminf.parallel.pipeline, which runs it with embedding and head in slices on all stages;
    # empty: published, with the head on the last stage, and run by nothing here.
    pipeline: str = ""
    divides: Callable[[int, int], bool] = lambda p, m: m >= p  # whether it can have m of them

    @property
    def spreads_vocabulary(self) -> bool:
        return bool(self.pipeline)


def _bubble(p: int, m: int) -> float:
    return (p - 1) / m


def _half_bubble(p: int, m: int) -> float:
    return (p - 1) / (2 * m)


# GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B and its interleaved form: Narayanan et al. 2021,
# arXiv:2104.04473; the latter's activations: Korthikanti et al. 2022, arXiv:2205.05198, section
# 4.2.3. Vocabulary parallelism with one barrier, which holds a micro-batch more: Yeung et al. 2024,
# arXiv:2411.05288.
SCHEDULES = {
    "gpipe": Schedule(_bubble, lambda p, m: m, divides=lambda p, m: True),
    "1f1b": Schedule(_bubble, lambda p, m: min(p, m)),
    "1f1b_interleaved": Schedule(
        _half_bubble, lambda p, m: min(p, m) * (1 + (p - 1) / (2 * p)), chunks=2,
        divides=lambda p, m: m % p == 0,
    ),
    "gpipe_vocab": Schedule(
        _bubble, lambda p, m: m, pipeline="gpipe", divides=lambda p, m: True
    ),
    "1f1b_vocab": Schedule(_bubble, lambda p, m: min(p + 1, m), pipeline="1f1b"),
    "1f1b_interleaved_vocab": Schedule(
        _half_bubble, lambda p, m: min(p * (1 + (p - 1) / (2 * p)) + 1, m), chunks=2,
        pipeline="interleaved", divides=lambda p, m: m % p == 0,
    ),
}  # fmt: skip
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
    def pipeline(self) -> str:
        """As `pipeline` of a `train_lm` config; empty without stages."""
        name = self.passes.pipeline
        return f"{name}:vocab=one_barrier,microbatches={self.accumulation}" if name else ""

    @property
    def grad_accum_steps(self) -> int:
        """A pipeline cuts a batch into its own microbatches."""
        return 1 if self.pipeline else self.accumulation

    @property
    def overrides(self) -> tuple[str, ...]:
        """Fields of a `train_lm` config that ask for this layout."""
        sizes = (f"mesh.{axis}={size}" for axis, size in asdict(self.sizes).items())
        piped = (f"pipeline={self.pipeline}",) if self.pipeline else ()
        return (
            *sizes, f"strategy={self.strategy}", *piped,
            f"grad_accum_steps={self.grad_accum_steps}", f"remat={self.remat}",
        )  # fmt: skip

    def of(self, program: TrainStep) -> TrainStep:
        """The program, laid out so on devices that need not be here."""
        return on_mesh(
            program, self.sizes, self.strategy, remat=self.remat,
            grad_accum_steps=self.grad_accum_steps,
            pipeline=pipeline.parse(self.pipeline) if self.pipeline else None,
        )  # fmt: skip


def on_mesh(program: TrainStep, sizes: MeshShape, strategy: str, **changes: Any) -> TrainStep:
    """The program on another mesh, whose devices need not be here."""
    devices = math.prod(asdict(sizes).values())
    laid_out, rules = mesh.absent(sizes, devices), partition.parse(strategy)
    if changes.get("pipeline") is not None:
        rules = rules * partition.PIPELINE
    elsewhere = replace(program, mesh=laid_out, strategy=rules, **changes)
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
    # Of all layers, and of the tables, as a device multiplies by them: not in slices of fsdp.
    weights: float
    tables: float
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
    rules = tuple(rule for rule in made.strategy.params if rule[1] != "fsdp")

    def unsliced_bytes(group: str) -> float:
        part = {name: x for name, x in state.params.items() if group_of(name) == group}
        laid_out = partition.shardings(part, decoder.AXES, rules, made.mesh)
        return float(partition.planned_bytes(part, laid_out))

    return ShardedBytes(
        **groups,
        weights=unsliced_bytes("layers"),
        tables=unsliced_bytes("vocabulary"),
        shards_weights=planning.shards_fsdp(made.strategy.params),
        shards_grads=planning.shards_fsdp(made.strategy.grads),
        channels={
            remat: planning.activation_channels(replace(made, remat=remat)) for remat in REMAT
        },
    )


def group_of(path: str) -> str:
    names = set(path.split("/"))
    if names & {"layers", "first_layers"}:
        return "layers"
    return "vocabulary" if names & set(planning.TABLES) else "other_params"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, of the stage that has most."""

    params: float
    grads: float
    optimizer: float  # with the float32 master parameters
    activations: float
    # planning.transient_bytes: gathered weights, gradients not yet added up or in slices
    transient: float

    @property
    def total(self) -> float:
        return self.params + self.grads + self.optimizer + self.activations + self.transient


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
    sliced = layout.sizes.fsdp > 1
    transient = planning.transient_bytes(
        sharded.weights / stages, vocabulary * sharded.tables,
        layer_slices=float(sharded.layers[1]) / stages, num_layers=spec.num_layers / stages,
        shards_weights=sharded.shards_weights and sliced,
        shards_grads=sharded.shards_grads and sliced and program.lora is None,
        pieces=1 if program.lora else count, piped=stages > 1, itemsize=itemsize,
    )  # fmt: skip
    activations = tokens * (in_flight * kept + working) * itemsize * MEASURED_ACTIVATIONS
    return Memory(float(params), float(grads), float(optimizer), activations, transient)
