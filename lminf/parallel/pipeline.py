"""A training step whose layers and vocabulary are divided over the mesh axis `stage`.

`pipeline_device.py` runs the schedule; here are its settings, what it refuses, and the program of
all devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lminf import ranges
from lminf.attention import attend
from lminf.config import closest, parse_choice
from lminf.errors import InputError
from lminf.models import layers
from lminf.models.decoder import Decoder
from lminf.models.spec import ModelSpec
from lminf.objectives.terms import CrossEntropy, Term, ZLoss, token_weights
from lminf.parallel import partition, schedules
from lminf.parallel.partition import Strategy
from lminf.parallel.pipeline_device import AXIS, VOCAB_SHARDED, Device
from lminf.parallel.schedules import Schedule
from lminf.parallel.ticks import tabulate
from lminf.ranges import Range
from lminf.types import Params

# How the vocabulary can be divided in a program that all devices run: each has its share.
VOCABULARIES = ("one_barrier", "two_barriers")


@dataclass(frozen=True)
class Pipeline:
    """How the microbatches of a step pass through the stages."""

    schedule: str
    vocab: str = "one_barrier"
    microbatches: Annotated[int, Range(min=1)] | None = None  # None: four for each stage

    def __post_init__(self):
        ranges.check(self)
        if self.vocab in ("last_stage", "interlaced"):
            raise InputError(
                f"vocab={self.vocab} would leave most devices of one program without their share "
                f"of the vocabulary's work; take one_barrier or two_barriers"
            )
        if self.vocab not in VOCABULARIES:
            raise InputError(
                f"no vocabulary of a pipelined step is called {self.vocab!r}; "
                f"{closest(self.vocab, VOCABULARIES)}"
            )

    def num_microbatches(self, mesh: Mesh) -> int:
        """Microbatches of a step."""
        return self.microbatches or 4 * mesh.shape[AXIS]

    def build(self, mesh: Mesh) -> Schedule:
        """The schedule over the stages of the mesh, in ticks of one pass."""
        return schedules.build(
            self.schedule, devices=mesh.shape[AXIS], microbatches=self.num_microbatches(mesh),
            vocab=self.vocab,
        )  # fmt: skip

    def buffered_microbatches(self, mesh: Mesh) -> int:
        """Hidden states of microbatches that a device holds between passes, the softmax aside."""
        slots = tabulate(self.build(mesh))[1]
        return slots.inputs + slots.gradients + slots.hidden + slots.parts


def parse(text: str) -> Pipeline:
    """`1f1b:vocab=one_barrier,microbatches=16`."""
    name, _, fields = text.partition(":")
    if name not in schedules.SCHEDULES:
        raise InputError(f"no pipeline is called {name!r}; {closest(name, schedules.SCHEDULES)}")
    return parse_choice(f"pipeline:schedule={name},{fields}".rstrip(","), {"pipeline": Pipeline})


def unsupported(spec: ModelSpec) -> str:
    """What of a model the stages of a pipeline cannot compute; empty where they can."""
    if spec.moe is not None:
        return "experts"
    return "a bias or a scale of its logits" if spec.head_bias or spec.logit_scale != 1.0 else ""


def check(pipeline: Pipeline, spec: ModelSpec, mesh: Mesh, objective: tuple[Term, ...]) -> None:
    """Refuses what the stages of a pipeline cannot divide or compute."""
    stages = mesh.shape[AXIS]
    if stages == 1:
        raise InputError("a pipeline needs stages; set mesh.stage to 2 or more")
    for axis in ("context", "expert"):
        if mesh.shape[axis] > 1:
            raise InputError(
                f"mesh.{axis}={mesh.shape[axis]}: a pipeline runs beside data, fsdp and tensor "
                f"only; set mesh.{axis}=1"
            )
    chunks = pipeline.build(mesh).form.chunks
    if spec.num_layers % (stages * chunks):
        each = f" with {chunks} chunks on each" if chunks > 1 else ""
        raise InputError(
            f"{spec.num_layers} layers do not divide over mesh.stage={stages}{each}; give a "
            f"multiple of {stages * chunks} layers"
            f"{', or a schedule with one chunk, such as 1f1b' if chunks > 1 else ''}"
        )
    if what := unsupported(spec):
        raise InputError(f"a model with {what} has no pipeline yet; leave the pipeline out")
    kinds = sorted(type(term).__name__ for term in objective)
    prefixes = [term.prefix for term in objective if isinstance(term, CrossEntropy)]
    if kinds[:1] != ["CrossEntropy"] or kinds[1:] not in ([], ["ZLoss"]) or prefixes != [""]:
        raise InputError(
            f"a pipeline minimises one cross-entropy of the tokens, and z-loss beside it, not "
            f"{' + '.join(kinds)}; leave the pipeline out"
        )


def gradients(
    pipeline: Pipeline,
    module: Decoder,
    params: Params,
    batch: Mapping[str, Array],
    *,
    mesh: Mesh,
    strategy: Strategy,
    objective: tuple[Term, ...],
) -> tuple[dict[str, Float[Array, ""]], Params]:
    """What the terms report, and the gradient of their sum, float32."""
    terms: dict[type, Any] = {type(term): term for term in objective}
    cross_entropy, z_loss = terms[CrossEntropy], terms[ZLoss].scale if ZLoss in terms else 0.0
    weights = token_weights(batch) / cross_entropy.weight(batch)
    device = partial(Device, scale=cross_entropy.scale, z_loss=z_loss / cross_entropy.scale)
    nll, gradient = _run(
        pipeline.build(mesh), device, module, params, {**batch, "weights": weights}, mesh, strategy
    )
    return {"loss": (weights * nll).sum()}, gradient


def token_nll(
    pipeline: Pipeline,
    module: Decoder,
    params: Params,
    batch: Mapping[str, Array],
    *,
    mesh: Mesh,
    strategy: Strategy,
) -> Float[Array, "B T"]:
    """Nats of every token, by the forward passes alone."""
    rows = len(batch["tokens"]) // (mesh.shape["data"] * mesh.shape["fsdp"])
    schedule = schedules.build(
        "gpipe",
        devices=mesh.shape[AXIS],
        microbatches=math.gcd(rows, pipeline.num_microbatches(mesh)),
        vocab="two_barriers",  # whose S computes no gradient
    )
    forward = tuple(each for each in schedule.passes if each.kind in "FS")
    schedule = replace(schedule, passes=forward)
    batch = {**batch, "weights": jnp.ones(batch["tokens"].shape, jnp.float32)}
    device = partial(Device, scale=1.0, z_loss=0.0)
    return _run(schedule, device, module, params, batch, mesh, strategy)[0]


def _run(schedule, device, module, params, batch, mesh, strategy):
    """(nats of every token [B, T], gradient): one program for all devices."""
    tokens, p, m = batch["tokens"], schedule.devices, schedule.microbatches
    chunks = schedule.form.chunks
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = {"positions": positions, **batch}
    rows = partition.spec(("batch", "length"), tokens.shape, strategy.activations, mesh)
    module = module.clone(prefill=attend.prefill, constrain=layers.unconstrained)
    # What `tensor` slices is left to the compiler, which cannot divide other kernels than XLA's.
    by_hand = {name for name, size in mesh.shape.items() if name != "tensor" or size == 1}
    if "tensor" not in by_hand:
        module = module.clone(implementation="xla_chunked")
    ticks, slots = tabulate(schedule)

    def local(params, batch):
        batch = jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), batch)
        stage = device(module, schedule, slots, params=params, batch=batch)
        carry, _ = jax.lax.scan(stage.tick, stage.start(), ticks)
        gradient = jax.lax.psum(carry.gradient, ("data", "fsdp"))
        shared = {name: g for name, g in gradient.items() if where[name] == P()}
        return carry.nll.reshape(-1, tokens.shape[1]), {**gradient, **jax.lax.psum(shared, AXIS)}

    # Rows that are none are added where the stages do not divide the vocabulary. Of every chunk of
    # the layers a device has its part: with several, weights move there at the start of the step.
    size = module.spec.vocab_size
    laid_out = {name: jnp.pad(w, ((0, -size % p), (0, 0))) if name in VOCAB_SHARDED else w
                for name, w in params.items()}  # fmt: skip
    laid_out["layers"] = jax.tree.map(
        lambda w: _turned(schedule, w.reshape(chunks, -1, *w.shape[1:])), laid_out["layers"]
    )
    where = {name: P(AXIS) if name in VOCAB_SHARDED else P() for name in params}
    where["layers"] = P(None, AXIS)
    out = where if "B" in schedule.kinds else {}
    nll, gradient = jax.shard_map(
        local, mesh=mesh, in_specs=(where, rows), out_specs=(rows, out), axis_names=by_hand,
        check_vma=False,
    )(laid_out, batch)  # fmt: skip
    if gradient:
        gradient["layers"] = jax.tree.map(
            lambda g: _turned(schedule, g).reshape(-1, *g.shape[2:]), gradient["layers"]
        )
    return nll, {name: g[:size] if name in VOCAB_SHARDED else g for name, g in gradient.items()}


def _turned(schedule: Schedule, w: Array) -> Array:
    """Layers [chunks, L, ...] in the order of the devices, from that of the stages; or back."""
    if not schedule.form.v_shaped:
        return w
    by_device = w.reshape(schedule.form.chunks, schedule.devices, -1, *w.shape[2:])
    return jnp.stack([by_device[0], by_device[1, ::-1]]).reshape(w.shape)
