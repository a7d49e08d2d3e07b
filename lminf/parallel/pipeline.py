"""A training step whose layers and vocabulary are divided over the mesh axis `stage`.

The schedule (schedules.py) is data that one compiled loop reads: in each tick every device runs the
pass that stands in its row, then activations go one device on and gradients one device back, then
the barriers that are due are reduced. Backward passes are jax.vjp of a stage from the input that it
kept: forward passes keep nothing else. Every device holds a share of the vocabulary's rows
(vocabulary.py), looks up its own tokens for the first stage and adds their gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.attention import attend, rope
from lminf.config import closest, parse_choice
from lminf.errors import InputError
from lminf.models import decoder, layers
from lminf.models.spec import ModelSpec
from lminf.objectives.terms import CrossEntropy, Term, ZLoss, token_weights
from lminf.parallel import partition, schedules, vocabulary
from lminf.parallel.partition import Strategy
from lminf.parallel.schedules import Schedule
from lminf.ranges import Range
from lminf.types import Hidden, Params

AXIS = "stage"
RUN = ("gpipe", "1f1b", "zero_bubble")  # the schedules that this runtime can follow
KINDS = ("", "F", "B", "W", "S", "T")  # of a tick's pass; the first is none
BY_VOCABULARY = ("embed", "head")  # parameters whose rows are divided over the stages


@dataclass(frozen=True)
class Pipeline:
    """How the microbatches of a step pass through the stages."""

    schedule: str
    vocab: str = "one_barrier"
    microbatches: Annotated[int, Range(min=1)] | None = None  # None: four for each stage

    def __post_init__(self):
        ranges.check(self)
        if self.schedule in schedules.SCHEDULES and self.schedule not in RUN:
            raise InputError(
                f"{self.schedule} puts layers of two depths on each device, which this runtime "
                f"does not; take {', '.join(RUN)}"
            )
        if self.vocab in ("last_stage", "interlaced"):
            raise InputError(
                f"vocab={self.vocab} would leave devices of one program without work of theirs; "
                f"take one_barrier or two_barriers"
            )

    def schedule_for(self, mesh: Mesh) -> Schedule:
        """The schedule over the stages of the mesh, in ticks of one pass."""
        devices = mesh.shape[AXIS]
        microbatches = self.microbatches or 4 * devices
        return schedules.build(
            self.schedule, devices=devices, microbatches=microbatches, vocab=self.vocab
        )


def parse(text: str) -> Pipeline:
    """`1f1b:vocab=one_barrier,microbatches=16`."""
    name, _, fields = text.partition(":")
    if name not in schedules.SCHEDULES:
        raise InputError(f"no pipeline is called {name!r}; {closest(name, schedules.SCHEDULES)}")
    return parse_choice(f"pipeline:schedule={name},{fields}".rstrip(","), {"pipeline": Pipeline})


def check(spec: ModelSpec, mesh: Mesh, objective: tuple[Term, ...]) -> None:
    """Refuses what the stages of a pipeline cannot divide or compute."""
    stages = mesh.shape[AXIS]
    if stages == 1:
        raise InputError("a pipeline needs stages; set mesh.stage to 2 or more")
    for axis in ("tensor", "context", "expert"):
        if mesh.shape[axis] > 1:
            raise InputError(
                f"mesh.{axis}={mesh.shape[axis]}: a pipeline runs beside data and fsdp only; set "
                f"mesh.{axis}=1"
            )
    if spec.num_layers % stages:
        raise InputError(
            f"{spec.num_layers} layers do not divide over mesh.stage={stages}; choose a number of "
            f"stages that divides them"
        )
    if spec.moe is not None or spec.head_bias or spec.logit_scale != 1.0:
        what = "experts" if spec.moe else "a bias or a scale of its logits"
        raise InputError(f"a model with {what} has no pipeline yet; leave the pipeline out")
    for term in objective:
        if not isinstance(term, CrossEntropy | ZLoss) or getattr(term, "prefix", ""):
            raise InputError(
                f"a pipeline minimises the cross-entropy and z-loss, not {type(term).__name__}; "
                f"leave the pipeline out"
            )


# --- A schedule as arrays -------------------------------------------------------------------------


class Ticks(NamedTuple):
    """What happens at each tick; numbers are microbatches, -1 where there is none."""

    op: Int[np.ndarray, "ticks p"]  # index into KINDS
    microbatch: Int[np.ndarray, "ticks p"]  # of the pass
    from_left: Int[np.ndarray, "ticks p"]  # whose activations arrive after the pass
    from_right: Int[np.ndarray, "ticks p"]  # whose gradients do
    embed: Int[np.ndarray, " ticks"]  # whose embeddings the first stage gets before the pass
    broadcast: Int[np.ndarray, " ticks"]  # whose hidden states all devices get from the last stage
    softmax: Int[np.ndarray, " ticks"]  # whose S is done everywhere: the first barrier
    hidden: Int[np.ndarray, " ticks"]  # whose T is, with two barriers: the second one
    embed_gradient: Int[np.ndarray, " ticks"]  # whose gradient all devices get from the first stage


class Slots(NamedTuple):
    """Microbatches that each buffer of a device must hold at once: what a schedule costs."""

    inputs: int  # of a stage, until its backward
    gradients: int  # of a stage's output
    hidden: int  # of the last stage, until T
    softmax: int  # from S until T
    parts: int  # of the gradient of hidden states, from T until the second barrier


def tabulate(schedule: Schedule) -> tuple[Ticks, Slots]:
    """The schedule as arrays, and the sizes of the buffers that serve it."""
    p, at = schedule.devices, {}
    length = 1 + max(each.tick for each in schedule.passes)
    by_device = [np.full((length, p), -1, np.int32) for _ in range(4)]
    ticks = Ticks(*by_device, *(np.full(length, -1, np.int32) for _ in range(5)))
    ticks.op[:] = 0
    for device, tick, kind, i, _ in schedule.passes:
        at[kind, device, i] = tick
        ticks.op[tick, device], ticks.microbatch[tick, device] = KINDS.index(kind), i
        if kind == "F" and device < p - 1:
            ticks.from_left[tick, device + 1] = i
        if kind == "B" and device > 0:
            ticks.from_right[tick, device - 1] = i
    spans: dict[str, list] = {name: [] for name in Slots._fields}
    forward_only = ("B", 0, 0) not in at
    last_use = "F" if forward_only else "W" if schedule.form.split else "B"
    for i in range(schedule.microbatches):
        ticks.embed[at["F", 0, i]] = ticks.broadcast[at["F", p - 1, i]] = i
        barrier = max(at["S", device, i] for device in range(p))
        ticks.softmax[barrier] = i
        if not forward_only:
            ticks.embed_gradient[at["B", 0, i]] = i
            if schedule.vocab == "two_barriers":
                barrier = max(at["T", device, i] for device in range(p))
                ticks.hidden[barrier] = i
        for d in range(p):
            freed, used = at[last_use, d, i], at["S" if forward_only else "T", d, i]
            spans["inputs"].append((d, i, at["F", max(d - 1, 0), i], freed))
            arrived = barrier if d == p - 1 else at.get(("B", d + 1, i), freed)
            spans["gradients"].append((d, i, arrived, freed))
            spans["hidden"].append((d, i, at["F", p - 1, i], used))
            spans["softmax"].append((d, i, at["S", d, i], max(used, barrier)))
            spans["parts"].append((d, i, used, barrier))
    return ticks, Slots(*(_slots(each) for each in spans.values()))


def _slots(spans: list[tuple[int, int, int, int]]) -> int:
    """Slots of a ring in which no microbatch takes the place of one that is still to be read."""
    return max(
        i - before + 1
        for device, i, start, _ in spans
        for other, before, _, end in spans
        if device == other and before <= i and (start < end or before == i)
    )


def _read(ring: Any, i: Int[Array, ""]) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i % x.shape[0], keepdims=False), ring
    )


def _write(ring: Any, i: Int[Array, ""], value: Any) -> Any:
    """The ring with microbatch i in it; unchanged where i is -1."""

    def one(x, new):
        new = jnp.where(i < 0, _read(x, i), new.astype(x.dtype))
        return jax.lax.dynamic_update_index_in_dim(x, new, i % x.shape[0], 0)

    return jax.tree.map(one, ring, value)


# --- One device -----------------------------------------------------------------------------------


class Carry(NamedTuple):
    """What a device keeps from tick to tick: rings [slots, ...], and sums."""

    inputs: Float[Array, "I R T D"]
    gradients: Float[Array, "G R T D"]
    hidden: Float[Array, "H R T D"]
    softmax: Any  # LocalSoftmax
    parts: Float[Array, "C R T D"] | None
    nll: Float[Array, "M R T"]  # of every microbatch
    gradient: Params | None  # float32, of this device's parameters


@dataclass(frozen=True)
class Device:
    """A device's passes, inside shard_map. `params` are its layers, its rows of the vocabulary and
    what all devices share; `batch` is [M, R, T] by name, M microbatches of R rows."""

    module: decoder.Decoder
    slots: Slots
    barriers: int
    split: bool  # whether W is a pass of its own
    scale: float  # of the cross-entropy
    z_loss: float  # beside a cross-entropy of scale 1
    params: Params
    batch: Mapping[str, Array]

    @property
    def index(self) -> Int[Array, ""]:
        return jax.lax.axis_index(AXIS)

    @property
    def classifier(self) -> str:
        return "head" if "head" in self.params else "embed"

    @property
    def first_row(self) -> Int[Array, ""]:
        return self.index * self.params["embed"].shape[0]

    def start(self, *, backward: bool) -> Carry:
        (_, rows, tokens), width = self.batch["tokens"].shape, self.module.spec.width
        ring = lambda slots: jnp.zeros((slots, rows, tokens, width), self.module.dtype)  # noqa: E731
        hidden = jnp.zeros((rows * tokens, width), self.module.dtype)
        softmax = jax.eval_shape(partial(self._softmax, jnp.int32(0)), hidden)
        softmax = jax.tree.map(
            lambda x: jnp.zeros((self.slots.softmax, *x.shape), x.dtype), softmax
        )
        gradient = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.params)
        return Carry(
            ring(self.slots.inputs), ring(self.slots.gradients), ring(self.slots.hidden), softmax,
            ring(self.slots.parts) if self.barriers == 2 and backward else None,
            jnp.zeros(self.batch["tokens"].shape, jnp.float32), gradient if backward else None,
        )  # fmt: skip

    def stage(self, params: Params, x: Hidden, i: Int[Array, ""]) -> Hidden:
        """This device's layers; on the first one what comes before, on the last the final norm."""
        s, batch = self.module.spec, _read(self.batch, i)
        positions, segments = batch["positions"], batch.get("segments")
        if s.embed_norm or isinstance(s.encoding, rope.Learnt):
            placed = decoder.place_embeds(s, params, x, positions).astype(x.dtype)
            x = jnp.where(self.index == 0, placed, x)
        attentions, _ = self.module.attentions(x.shape[1], positions, segments)
        stacked = {"layers": params["layers"]}
        x, _, _ = self.module.run_layers(stacked, x, attentions)
        norm: Any = layers.Norm(s.norm, s.width).apply
        normed = norm({"params": params["final_norm"]}, x)
        return jnp.where(self.index == jax.lax.axis_size(AXIS) - 1, normed, x)

    # --- Passes: (carry, microbatch) -> carry, what is sent to the neighbours ---------------------

    def idle(self, carry: Carry, i: Int[Array, ""]) -> tuple[Carry, Hidden]:
        return carry, jnp.zeros_like(carry.inputs[0])

    def forward(self, carry: Carry, i: Int[Array, ""]) -> tuple[Carry, Hidden]:
        return carry, self.stage(self.params, _read(carry.inputs, i), i)

    def backward(
        self, carry: Carry, i: Int[Array, ""], *, weights: bool, inputs: bool
    ) -> tuple[Carry, Hidden]:
        """B and W: from the stage's input, whose forward is computed again."""
        x, gradient = _read(carry.inputs, i), _read(carry.gradients, i)
        params = {name: w for name, w in self.params.items() if name not in BY_VOCABULARY}
        _, vjp = jax.vjp(partial(self.stage, i=i), params, x)  # what is not used is not computed
        of_params, of_x = vjp(gradient)
        if weights:
            total = {name: carry.gradient[name] for name in params}
            total = jax.tree.map(lambda t, w: t + w.astype(t.dtype), total, of_params)
            carry = carry._replace(gradient={**carry.gradient, **total})
        return carry, of_x if inputs else jnp.zeros_like(x)

    def _softmax(self, i: Int[Array, ""], hidden: Float[Array, "N D"]) -> vocabulary.LocalSoftmax:
        s = self.module.spec
        return vocabulary.softmax_pass(
            hidden, self.params[self.classifier], _read(self.batch["targets"], i).reshape(-1),
            first=self.first_row, vocab_size=s.vocab_size, soft_cap=s.final_soft_cap,
            barriers=self.barriers,
        )  # fmt: skip

    def softmax(self, carry: Carry, i: Int[Array, ""]) -> tuple[Carry, Hidden]:
        hidden = _read(carry.hidden, i)
        local = self._softmax(i, hidden.reshape(-1, hidden.shape[-1]))
        carry = carry._replace(softmax=_write(carry.softmax, i, local))
        return self.idle(carry, i)

    def classifier_gradient(self, carry: Carry, i: Int[Array, ""]) -> tuple[Carry, Hidden]:
        """T."""
        hidden, name = _read(carry.hidden, i), self.classifier
        of_rows, of_hidden = vocabulary.gradient_pass(
            _read(carry.softmax, i), hidden.reshape(-1, hidden.shape[-1]), self.params[name],
            _read(self.batch["targets"], i).reshape(-1), first=self.first_row,
        )  # fmt: skip
        if of_hidden is not None:
            parts = _write(carry.parts, i, of_hidden.reshape(hidden.shape))
            carry = carry._replace(parts=parts)
        total = {**carry.gradient, name: carry.gradient[name] + of_rows}
        return self.idle(carry._replace(gradient=total), i)

    # --- Communication ----------------------------------------------------------------------------

    def _own_tokens(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """Rows of this device for the tokens of a microbatch, and which tokens are its own."""
        rows = _read(self.batch["tokens"], i) - self.first_row
        own = (rows >= 0) & (rows < self.params["embed"].shape[0])
        return jnp.where(own, rows, 0), own[..., None]

    def embed(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        rows, own = self._own_tokens(i)
        x = decoder.embed_tokens(self.module.spec, self.params, rows, dtype=self.module.dtype)
        x = jax.lax.psum(jnp.where(own, x, 0), AXIS)
        return carry._replace(inputs=_write(carry.inputs, jnp.where(self.index == 0, i, -1), x))

    def embed_gradient(self, carry: Carry, i: Int[Array, ""], sent: Hidden) -> Carry:
        rows, own = self._own_tokens(i)
        x = jax.lax.psum(jnp.where(self.index == 0, sent, 0), AXIS).astype(jnp.float32)
        x = jnp.where(own, x * self.module.spec.embed_scale, 0)
        total = carry.gradient["embed"].at[rows].add(x)
        return carry._replace(gradient={**carry.gradient, "embed": total})

    def _is_last(self) -> Array:
        return self.index == jax.lax.axis_size(AXIS) - 1

    def broadcast(self, carry: Carry, i: Int[Array, ""], sent: Hidden) -> Carry:
        x = jax.lax.psum(jnp.where(self._is_last(), sent, 0), AXIS)
        return carry._replace(hidden=_write(carry.hidden, i, x))

    def _to_last(self, carry: Carry, i: Int[Array, ""], gradient: Array) -> Carry:
        gradient = gradient.reshape(carry.gradients.shape[1:])
        where = jnp.where(self._is_last(), i, -1)
        return carry._replace(gradients=_write(carry.gradients, where, gradient))

    def reduce_softmax(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        weight = self.scale * _read(self.batch["weights"], i).reshape(-1)
        reduced = vocabulary.reduce_softmax(
            _read(carry.softmax, i), weight, axis=AXIS, z_loss=self.z_loss
        )
        nll = reduced.nll.reshape(carry.nll.shape[1:])
        carry = carry._replace(
            softmax=_write(carry.softmax, i, reduced.local), nll=_write(carry.nll, i, nll)
        )
        if reduced.hidden_gradient is None or carry.gradient is None:
            return carry
        return self._to_last(carry, i, reduced.hidden_gradient)

    def reduce_hidden(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        return self._to_last(carry, i, jax.lax.psum(_read(carry.parts, i), AXIS))

    def exchange(self, carry: Carry, row: Ticks, sent: Hidden) -> Carry:
        """Activations one device on, gradients one device back; once round, for one program."""
        p = jax.lax.axis_size(AXIS)
        on = jax.lax.ppermute(sent, AXIS, [(d, (d + 1) % p) for d in range(p)])
        back = jax.lax.ppermute(sent, AXIS, [(d, (d - 1) % p) for d in range(p)])
        return carry._replace(
            inputs=_write(carry.inputs, row.from_left[self.index], on),
            gradients=_write(carry.gradients, row.from_right[self.index], back),
        )

    def tick(self, carry: Carry, row: Ticks) -> tuple[Carry, None]:
        """One row of the schedule. Which barriers are due is the same on all devices, so that all
        of them enter a collective or none does."""
        passes = [
            self.idle, self.forward,
            partial(self.backward, inputs=True, weights=not self.split),
            partial(self.backward, inputs=False, weights=True), self.softmax, self.classifier_gradient,
        ]  # fmt: skip
        carry = _when(row.embed, self.embed, carry)
        i = row.microbatch[self.index]
        carry, sent = jax.lax.switch(row.op[self.index], passes, carry, i)
        moves = jnp.maximum(row.from_left.max(), row.from_right.max())
        carry = _when(moves, lambda carry, _: self.exchange(carry, row, sent), carry)
        carry = _when(row.broadcast, self.broadcast, carry, sent)
        carry = _when(row.softmax, self.reduce_softmax, carry)
        if self.barriers == 2:
            carry = _when(row.hidden, self.reduce_hidden, carry)
        return _when(row.embed_gradient, self.embed_gradient, carry, sent), None


def _when(i: Array, step: Callable[..., Carry], carry: Carry, *args: Array) -> Carry:
    """The carry after `step` with microbatch i, where there is one."""
    return jax.lax.cond(i >= 0, step, lambda carry, *_: carry, carry, i, *args)


# --- The step -------------------------------------------------------------------------------------


def gradients(
    pipeline: Pipeline,
    module: decoder.Decoder,
    params: Params,
    batch: Mapping[str, Array],
    *,
    mesh: Mesh,
    strategy: Strategy,
    objective: tuple[Term, ...],
) -> tuple[dict[str, Float[Array, ""]], Params]:
    """What the terms report, and the gradient of their sum, float32."""
    terms = {type(term): term for term in objective}
    scale = terms[CrossEntropy].scale
    z_loss = terms[ZLoss].scale / scale if ZLoss in terms else 0.0
    weights = token_weights(batch) / terms[CrossEntropy].weight(batch)
    schedule = pipeline.schedule_for(mesh)
    run = partial(_run, schedule, module, mesh, strategy, scale, z_loss)
    nll, gradient = run(params, {**batch, "weights": weights}, backward=True)
    return {"loss": (weights * nll).sum()}, gradient


def _run(schedule, module, mesh, strategy, scale, z_loss, params, batch, *, backward):
    """(loss of every token [B, T], gradient)."""
    rows = partition.spec(("batch", "length"), batch["tokens"].shape, strategy.activations, mesh)
    over_rows = tuple(name for name in ("data", "fsdp") if mesh.shape[name] > 1)
    if "positions" not in batch:
        tokens = batch["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        batch = {**batch, "positions": positions}
    ticks, slots = tabulate(schedule)
    module = module.clone(prefill=attend.prefill, constrain=layers.unconstrained)
    m, vocab_size, p = schedule.microbatches, module.spec.vocab_size, mesh.shape[AXIS]

    def local(params, batch):
        device = Device(
            module, slots, schedules.VOCABULARIES[schedule.vocab], schedule.form.split, scale, z_loss,
            params, jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), batch),
        )  # fmt: skip
        carry, _ = jax.lax.scan(device.tick, device.start(backward=backward), ticks)
        gradient = jax.lax.psum(carry.gradient, over_rows)
        shared = {name: g for name, g in gradient.items() if name not in (*BY_VOCABULARY, "layers")}
        return carry.nll.reshape(-1, carry.nll.shape[-1]), {
            **gradient, **jax.lax.psum(shared, AXIS),
        }  # fmt: skip

    # Rows are added where the stages do not divide the vocabulary.
    padding = ((0, -vocab_size % p), (0, 0))
    padded = {name: jnp.pad(w, padding) if name in BY_VOCABULARY else w
              for name, w in params.items()}  # fmt: skip
    where = {name: P(AXIS) if name in (*BY_VOCABULARY, "layers") else P() for name in params}
    nll, gradient = jax.shard_map(
        local, mesh=mesh, in_specs=(where, rows), out_specs=(rows, where), check_vma=False
    )(padded, batch)
    return nll, {name: g[:vocab_size] if name in BY_VOCABULARY else g
                 for name, g in gradient.items()}  # fmt: skip
