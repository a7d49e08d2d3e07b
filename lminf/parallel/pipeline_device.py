"""What one device of a pipeline does, inside shard_map.

A schedule is data that one compiled loop reads. In each tick every device runs the pass that stands
in its row; then activations go to the device of the next stage and gradients to that of the one
before, and the barriers that are due are reduced. A forward pass
keeps its stage's input and nothing else: the backward is jax.vjp of the stage from there. Every
device holds a share of the vocabulary's rows (vocabulary.py), looks up its own tokens for the first
stage and adds their gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import rope
from lminf.models import decoder, layers
from lminf.parallel import vocabulary
from lminf.parallel.schedules import VOCABULARIES, Schedule
from lminf.parallel.ticks import KINDS, Slots, Ticks
from lminf.types import Hidden, Params

AXIS = "stage"
VOCAB_SHARDED = ("embed", "head")  # parameters whose rows are divided over the stages


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


class Carry(NamedTuple):
    """What a device keeps from tick to tick: rings [slots, ...] and sums."""

    inputs: Float[Array, "slots R T D"]
    gradients: Float[Array, "slots R T D"]
    hidden: Float[Array, "slots R T D"]
    softmax: Any  # vocabulary.LocalSoftmax
    parts: Float[Array, "slots R T D"]
    nll: Float[Array, "M R T"]  # of every microbatch
    gradient: Params  # float32, of this device's parameters; {} without backward passes


Done: TypeAlias = tuple[Carry, Hidden]  # after a pass, and what goes to the neighbours


@dataclass(frozen=True)
class Device:
    """The passes of one device, and its part in the collectives."""

    module: decoder.Decoder
    schedule: Schedule
    slots: Slots
    scale: float  # of the cross-entropy
    z_loss: float  # beside a cross-entropy of scale 1
    # Its layers [chunks, layers, ...], its rows of the vocabulary, and what all devices share.
    params: Params
    batch: Mapping[str, Array]  # [M, R, T]: M microbatches of R rows

    @property
    def index(self) -> Int[Array, ""]:
        return jax.lax.axis_index(AXIS)

    @property
    def last(self) -> int:
        """The device of the last stage."""
        return self.schedule.device_and_chunk(self.schedule.last)[0]

    @property
    def chunks(self) -> int:
        return self.schedule.form.chunks

    @property
    def barriers(self) -> int:
        return VOCABULARIES[self.schedule.vocab]

    @property
    def head(self) -> str:
        return "head" if "head" in self.params else "embed"

    @property
    def first_row(self) -> Int[Array, ""]:
        return self.index * self.params["embed"].shape[0]

    def start(self) -> Carry:
        """Before the first tick."""
        (_, *shape), width = self.batch["tokens"].shape, self.module.spec.width
        x = jax.ShapeDtypeStruct((*shape, width), self.module.dtype)
        part = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        softmax = jax.eval_shape(self._softmax, x, jnp.int32(0))

        def empty(slots, tree):
            return jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), tree)

        trained = self.params if "B" in self.schedule.kinds else {}
        of = self.slots
        return Carry(
            empty(of.inputs, x), empty(of.gradients, x), empty(of.hidden, x),
            empty(of.softmax, softmax), empty(of.parts if self.barriers == 2 else 0, part),
            jnp.zeros(self.batch["tokens"].shape, jnp.float32),
            jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), trained),
        )  # fmt: skip

    def stage(self, params: Params, x: Hidden, virtual: Int[Array, ""]) -> Hidden:
        """The layers of a chunk; in the first one what comes before, in the last the final norm."""
        i, chunk = self.schedule.microbatch_and_chunk(virtual)
        s, batch = self.module.spec, _read(self.batch, i)
        positions = batch["positions"]
        if s.embed_norm or isinstance(s.encoding, rope.Learnt):
            placed = decoder.place_embeds(s, params, x, positions).astype(x.dtype)
            x = jnp.where((self.index == 0) & (chunk == 0), placed, x)
        attentions, _ = self.module.attentions(x.shape[1], positions, batch.get("segments"))
        x, _, _ = self.module.run_layers({"layers": _read(params["layers"], chunk)}, x, attentions)
        norm: Any = layers.Norm(s.norm, s.width).apply
        normed = norm({"params": params["final_norm"]}, x)
        return jnp.where((self.index == self.last) & (chunk == self.chunks - 1), normed, x)

    # --- Passes -----------------------------------------------------------------------------------

    def idle(self, carry: Carry, i: Int[Array, ""]) -> Done:
        return carry, jnp.zeros_like(carry.inputs[0])

    def forward(self, carry: Carry, i: Int[Array, ""]) -> Done:
        """F of a virtual microbatch, as for B and W."""
        return carry, self.stage(self.params, _read(carry.inputs, i), i)

    def backward(
        self, carry: Carry, i: Int[Array, ""], *, of_weights: bool, of_input: bool
    ) -> Done:
        """B and W, whose forward is computed again."""
        x, gradient = _read(carry.inputs, i), _read(carry.gradients, i)
        params = {name: w for name, w in self.params.items() if name not in VOCAB_SHARDED}
        # What is not used is not computed.
        _, vjp = jax.vjp(partial(self.stage, virtual=i), params, x)
        weights, x_gradient = vjp(gradient)
        if of_weights:
            total = {name: carry.gradient[name] for name in params}
            total = jax.tree.map(lambda t, w: t + w.astype(t.dtype), total, weights)
            carry = carry._replace(gradient={**carry.gradient, **total})
        return carry, x_gradient if of_input else jnp.zeros_like(x)

    def _softmax(self, hidden: Hidden, i: Int[Array, ""]) -> vocabulary.LocalSoftmax:
        s, targets = self.module.spec, _read(self.batch["targets"], i)
        return vocabulary.softmax_pass(
            hidden.reshape(-1, s.width), self.params[self.head], targets.reshape(-1),
            first=self.first_row, vocab_size=s.vocab_size, soft_cap=s.final_soft_cap,
            barriers=self.barriers,
        )  # fmt: skip

    def softmax(self, carry: Carry, i: Int[Array, ""]) -> Done:
        """S."""
        local = self._softmax(_read(carry.hidden, i), i)
        return self.idle(carry._replace(softmax=_write(carry.softmax, i, local)), i)

    def head_gradient(self, carry: Carry, i: Int[Array, ""]) -> Done:
        """T."""
        hidden, targets = _read(carry.hidden, i), _read(self.batch["targets"], i)
        rows, part = vocabulary.gradient_pass(
            _read(carry.softmax, i), hidden.reshape(-1, hidden.shape[-1]), self.params[self.head],
            targets.reshape(-1), first=self.first_row,
        )  # fmt: skip
        if part is not None:
            carry = carry._replace(parts=_write(carry.parts, i, part.reshape(hidden.shape)))
        total = {**carry.gradient, self.head: carry.gradient[self.head] + rows}
        return self.idle(carry._replace(gradient=total), i)

    # --- Collectives ------------------------------------------------------------------------------

    def _own_tokens(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """Rows of this device for the tokens of a microbatch, and which tokens are its own."""
        rows = _read(self.batch["tokens"], i) - self.first_row
        local = (rows >= 0) & (rows < self.params["embed"].shape[0])
        return jnp.where(local, rows, 0), local[..., None]

    def _from(self, device: int, x: Array) -> Array:
        """The x of that device, on all of them."""
        return jax.lax.psum(jnp.where(self.index == device, x, 0), AXIS)

    def embed(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        rows, local = self._own_tokens(i)
        x = decoder.embed_tokens(self.module.spec, self.params, rows, dtype=self.module.dtype)
        x = jax.lax.psum(jnp.where(local, x, 0), AXIS)
        where = jnp.where(self.index == 0, self.schedule.virtual_microbatch(i, 0), -1)
        return carry._replace(inputs=_write(carry.inputs, where, x))

    def embed_gradient(self, carry: Carry, i: Int[Array, ""], sent: Hidden) -> Carry:
        rows, local = self._own_tokens(i)
        x = self._from(0, sent).astype(jnp.float32) * self.module.spec.embed_scale
        total = carry.gradient["embed"].at[rows].add(jnp.where(local, x, 0))
        return carry._replace(gradient={**carry.gradient, "embed": total})

    def broadcast(self, carry: Carry, i: Int[Array, ""], sent: Hidden) -> Carry:
        return carry._replace(hidden=_write(carry.hidden, i, self._from(self.last, sent)))

    def _to_last(self, carry: Carry, i: Int[Array, ""], gradient: Array) -> Carry:
        virtual = self.schedule.virtual_microbatch(i, self.chunks - 1)
        where = jnp.where(self.index == self.last, virtual, -1)
        gradient = gradient.reshape(carry.gradients.shape[1:])
        return carry._replace(gradients=_write(carry.gradients, where, gradient))

    def reduce_softmax(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        """The first barrier."""
        weight = self.scale * _read(self.batch["weights"], i).reshape(-1)
        local = _read(carry.softmax, i)
        reduced = vocabulary.reduce_softmax(local, weight, axis=AXIS, z_loss=self.z_loss)
        nll = reduced.nll.reshape(carry.nll.shape[1:])
        softmax = _write(carry.softmax, i, reduced.local)
        carry = carry._replace(softmax=softmax, nll=_write(carry.nll, i, nll))
        if reduced.hidden_gradient is None:
            return carry
        return self._to_last(carry, i, reduced.hidden_gradient)

    def reduce_hidden(self, carry: Carry, i: Int[Array, ""]) -> Carry:
        """The second one."""
        return self._to_last(carry, i, jax.lax.psum(_read(carry.parts, i), AXIS))

    def exchange(self, carry: Carry, row: Ticks, sent: Hidden) -> Carry:
        """Activations to the next stage, gradients to the one before: one device on or back, around
        the ring from the last device to the first; at the turn of a V they stay where they are.
        """
        p = self.schedule.devices
        left, right = (self.index - 1) % p, (self.index + 1) % p
        on = jax.lax.ppermute(sent, AXIS, [(d, (d + 1) % p) for d in range(p)])
        back = jax.lax.ppermute(sent, AXIS, [((d + 1) % p, d) for d in range(p)])
        if self.schedule.form.v_shaped:
            both = ((left, on), (right, back), (self.index, sent))
            activations, gradients = both, both
        else:
            activations, gradients = ((left, on),), ((right, back),)
        for source, x in activations:
            where = self._arriving(row, source, "F")
            carry = carry._replace(inputs=_write(carry.inputs, where, x))
        for source, x in gradients:
            where = self._arriving(row, source, "B")
            carry = carry._replace(gradients=_write(carry.gradients, where, x))
        return carry

    def _arriving(self, row: Ticks, source: Int[Array, ""], kind: str) -> Int[Array, ""]:
        """The virtual microbatch that this device gets from a pass of the source, or -1."""
        s, virtual = self.schedule, _microbatch(row, source, kind)
        i, chunk = s.microbatch_and_chunk(virtual)
        stage = s.stage(source, chunk) + (1 if kind == "F" else -1)
        device, chunk = s.device_and_chunk(stage)
        here = (virtual >= 0) & (stage >= 0) & (stage <= s.last) & (device == self.index)
        return jnp.where(here, s.virtual_microbatch(i, chunk), -1)

    def _at_end(self, row: Ticks, kind: str, stage: int) -> Int[Array, ""]:
        """The microbatch of a pass through the first stage or the last in the row, or -1."""
        device, end = self.schedule.device_and_chunk(stage)
        virtual = _microbatch(row, device, kind)
        i, chunk = self.schedule.microbatch_and_chunk(virtual)
        return jnp.where((virtual >= 0) & (chunk == end), i, -1)

    def tick(self, carry: Carry, row: Ticks) -> tuple[Carry, None]:
        """One row of the schedule. What a row says is the same on all devices, so that all of them
        enter a collective or none does."""
        passes = {
            "": self.idle, "F": self.forward, "S": self.softmax,
            "B": partial(self.backward, of_input=True, of_weights="W" not in self.schedule.kinds),
            "T": self.head_gradient,
            "W": partial(self.backward, of_input=False, of_weights=True),
        }  # fmt: skip
        branches = [passes[kind] for kind in KINDS if kind in {"", *self.schedule.kinds}]
        first, last = 0, self.schedule.last
        carry = _when(self._at_end(row, "F", first), self.embed, carry)
        carry, sent = jax.lax.switch(
            row.op[self.index], branches, carry, row.microbatch[self.index]
        )
        moves = ((row.op == KINDS.index("F")) | (row.op == KINDS.index("B"))).any()
        carry = jax.lax.cond(moves, self.exchange, lambda carry, *_: carry, carry, row, sent)
        carry = _when(self._at_end(row, "F", last), self.broadcast, carry, sent)
        carry = _when(row.softmax, self.reduce_softmax, carry)
        if self.barriers == 2:
            carry = _when(row.hidden, self.reduce_hidden, carry)
        if carry.gradient:
            carry = _when(self._at_end(row, "B", first), self.embed_gradient, carry, sent)
        return carry, None


def _microbatch(row: Ticks, device: Any, kind: str) -> Int[Array, ""]:
    """That of the device's pass of this kind in the row; -1 where its pass is another."""
    return jnp.where(row.op[device] == KINDS.index(kind), row.microbatch[device], -1)


def _when(i: Any, step: Callable[..., Carry], carry: Carry, *args: Array) -> Carry:
    """The carry after `step` with microbatch i, where there is one."""
    return jax.lax.cond(i >= 0, step, lambda carry, *_: carry, carry, i, *args)
