"""One optimiser step as one program: loss, gradient and update of a model that lies on a mesh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lminf import ranges
from lminf.attention.policy import LayerPolicy
from lminf.models import decoder, moe
from lminf.models.spec import ModelSpec
from lminf.parallel import context, partition, vocab
from lminf.parallel.partition import Strategy
from lminf.ranges import Range
from lminf.surgery.lora import LoRA
from lminf.types import Params

Batch: TypeAlias = Mapping[str, Array]  # lminf.train.batches says what it holds
# What the backward finds in memory, and what it computes again.
REMAT: dict[str, Any] = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # each layer's input
}


class State(NamedTuple):
    """What training changes."""

    params: Params  # what the forward pass reads, in the dtype of the computation
    masters: Params | None  # the float32 parameters, where `params` are something shorter
    optimizer: Any
    step: Any  # int32, batches seen
    skipped: Any  # int32, those that changed nothing because they gave no finite gradient
    frozen: Params | None = None  # the model, where `params` are adapters of it

    @property
    def exact(self) -> Params:
        """What is trained, in float32."""
        return self.params if self.masters is None else self.masters


class Metrics(NamedTuple):
    """Of one step; scalars on the device."""

    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]
    rate: Float[Array, ""]
    finite: Array  # bool; otherwise the step changed nothing
    routing: Mapping[str, Float[Array, ""]] | None = None  # of a mixture: balance, z, dropped


@dataclass(frozen=True)
class Program:
    """A model, where it lies and how it learns: all that a compiled step depends on."""

    spec: ModelSpec
    policies: tuple[LayerPolicy, ...]  # [L]
    mesh: Mesh
    strategy: Strategy
    optimizer: optax.GradientTransformation  # for a rate of 1
    rate: Callable[[Array], Array]  # of the step
    dtype: Any = jnp.float32  # of the computation
    remat: str = "none"
    accumulate: Annotated[int, Range(min=1)] = 1  # pieces of a batch, one after another
    clip: Annotated[float, Range(above=0)] | None = 1.0  # of the gradient's norm
    z_loss: Annotated[float, Range(min=0)] = 0.0  # weight of lse ** 2
    balance: Annotated[float, Range(min=0)] = (
        0.01  # of a mixture of experts: weight of the loss that spreads tokens evenly
    )
    router_z: Annotated[float, Range(min=0)] = (
        0.001  # of a mixture of experts: weight of its routers' lse ** 2
    )
    lora: LoRA | None = None  # adapters to train, instead of the model

    def __post_init__(self):
        ranges.check(self)

    @cached_property
    def module(self) -> decoder.Decoder:
        return decoder.Decoder(
            self.spec,
            self.policies,
            dtype=self.dtype,
            remat=REMAT[self.remat],
            prefill=context.Sharded(self.mesh, self.strategy),
            place=partition.Placed(self.mesh, self.strategy),
        )

    # --- State ------------------------------------------------------------------------------------

    def state_of(self, params: Params) -> State:
        """The state before the first step, from float32 parameters; traceable."""
        if self.lora is not None:
            adapters = self.lora.init(params, key=jax.random.key(0))
            frozen = jax.tree.map(self._short, params)
            zero = jnp.zeros((), jnp.int32)
            return State(adapters, None, self.optimizer.init(adapters), zero, zero, frozen)
        short = None if self.dtype == jnp.float32 else jax.tree.map(self._short, params)
        optimizer = self.optimizer.init(params)
        zero = jnp.zeros((), jnp.int32)
        if short is None:
            return State(params, None, optimizer, zero, zero)
        return State(short, params, optimizer, zero, zero)

    def _short(self, leaf):
        return leaf.astype(self.dtype)

    @cached_property
    def shapes(self) -> State:
        return jax.eval_shape(self._fresh, jax.random.key(0))

    @cached_property
    def shardings(self) -> State:
        """Where every array of the state lies."""
        if self.shapes.frozen is not None:  # adapters are small, and whole on every device
            whole = NamedSharding(self.mesh, PartitionSpec())
            everywhere = jax.tree.map(lambda _: whole, self.shapes)
            frozen = self._laid_out(self.shapes.frozen, self.strategy.params)
            return everywhere._replace(frozen=frozen)
        laid_out = partial(self._laid_out, self.shapes.params)
        opt = laid_out(self.strategy.opt)
        exact = laid_out(self.strategy.params) if self.shapes.masters is None else opt
        whole = NamedSharding(self.mesh, PartitionSpec())
        return State(
            exact if self.shapes.masters is None else laid_out(self.strategy.params),
            None if self.shapes.masters is None else opt,
            partition.following(self.shapes.optimizer, self.shapes.params, opt, self.mesh),
            whole,
            whole,
        )

    @cached_property
    def gradient_shardings(self) -> Params:
        if self.lora is not None:
            return self.shardings.params
        return self._laid_out(self.shapes.params, self.strategy.grads)

    def _laid_out(self, params, rules):
        return partition.shardings(params, decoder.AXES, rules, self.mesh)

    def _fresh(self, key) -> State:
        return self.state_of(decoder.init(self.spec, key=key))

    def init(self, *, key: jax.Array) -> State:
        """Fresh parameters, equal on any mesh, each device making its own part."""
        return jax.jit(self._fresh, out_shardings=self.shardings)(key)

    def start(self, params: Params) -> State:
        """The state before the first step of continuing with these parameters."""
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        return jax.jit(self.state_of, out_shardings=self.shardings)(exact)

    # --- Loss -------------------------------------------------------------------------------------

    def weights(self, params: Params, frozen: Params | None) -> Params:
        """The model's parameters, where `params` is what is trained."""
        if self.lora is None:
            return params
        assert frozen is not None
        return self.lora.merge(frozen, params)

    def finished(self, state: State) -> Params:
        """The trained model: with its adapters merged, if it has any."""
        if state.frozen is None:
            return state.exact
        return jax.jit(self.weights, out_shardings=self.shardings.frozen)(
            state.params, state.frozen
        )

    def token_loss(
        self, params: Params, batch: Batch, frozen: Params | None = None
    ) -> vocab.TokenLoss:
        """The loss of every token."""
        return self._scored(params, batch, frozen)[0]

    def _scored(
        self, params: Params, batch: Batch, frozen: Params | None
    ) -> tuple[vocab.TokenLoss, dict[str, Float[Array, ""]]]:
        """The loss of every token, and the mean over layers of what routers did, if there are."""
        params = self.weights(params, frozen)
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        applied: Any = self.module.apply(
            {"params": params}, tokens, positions=positions, segments=batch.get("segments"),
            mutable=[moe.ROUTING],
        )  # fmt: skip
        (hidden, _), seen = applied
        routing = {}
        if self.spec.moe is not None:
            measured = seen[moe.ROUTING]["layers"]["moe"]
            routing = {name: found.mean() for name, (found,) in measured.items()}
        loss = vocab.token_loss(
            self.spec, params, hidden, batch["targets"], mesh=self.mesh, strategy=self.strategy
        )
        return loss, routing

    def _share(self, params: Params, frozen, batch: Batch, total: Float[Array, ""]):
        """This batch's part of the mean over `total` weight: what is minimised, and the metrics."""
        found, routing = self._scored(params, batch, frozen)
        weights = batch.get("weights", jnp.ones_like(found.nll))
        nll = (weights * found.nll).sum() / total
        minimised = nll + self.z_loss * (weights * jnp.square(found.lse)).sum() / total
        routing = {name: value / self.accumulate for name, value in routing.items()}
        if routing:
            minimised += self.balance * routing["balance"] + self.router_z * routing["z"]
        return minimised, (nll, routing)

    def gradients(
        self, params: Params, batch: Batch, frozen: Params | None = None
    ) -> tuple[Float[Array, ""], Params]:
        """Mean loss (nats per token, without the losses beside it) and gradient, laid out by the
        strategy.
        """
        (loss, _), gradient = self._gradients(params, batch, frozen)
        return loss, gradient

    def _gradients(self, params: Params, batch: Batch, frozen: Params | None):
        """(the loss, what routers did), and the gradient."""
        weights = batch.get("weights")
        total = jnp.float32(batch["tokens"].size) if weights is None else weights.sum()
        total = jnp.maximum(total, 1.0)
        laid_out = self.gradient_shardings

        def one(piece):
            gradient, found = jax.grad(self._share, has_aux=True)(params, frozen, piece, total)
            return found, jax.lax.with_sharding_constraint(gradient, laid_out)

        if self.accumulate == 1:
            return one(batch)

        def add(carry, piece):
            so_far, summed = carry
            found, gradient = one(piece)
            summed = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), summed, gradient)
            so_far = jax.tree.map(jnp.add, so_far, found)
            return (so_far, jax.lax.with_sharding_constraint(summed, laid_out)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zeros = jax.lax.with_sharding_constraint(zeros, laid_out)
        pieces = jax.tree.map(self._pieces, dict(batch))
        names = () if self.spec.moe is None else moe.MEASURES
        nothing = jnp.float32(0), dict.fromkeys(names, jnp.float32(0))
        (found, summed), _ = jax.lax.scan(add, (nothing, zeros), pieces)
        return found, summed

    def _pieces(self, x):
        """[B, T] -> [accumulate, B / accumulate, T]; every device cuts its own rows."""
        rows = x.reshape(x.shape[0] // self.accumulate, self.accumulate, x.shape[1])
        where = partition.spec(
            (None, "batch", "length"), rows.swapaxes(0, 1).shape, self.strategy.activations,
            self.mesh,
        )  # fmt: skip
        return jax.lax.with_sharding_constraint(
            rows.swapaxes(0, 1), NamedSharding(self.mesh, where)
        )

    # --- Step -------------------------------------------------------------------------------------

    def update(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        (loss, routing), gradient = self._gradients(state.params, batch, state.frozen)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        norm = optax.tree.norm(gradient)
        if self.clip is not None:
            factor = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        rate = self.rate(state.step)
        changes, optimizer = self.optimizer.update(gradient, state.optimizer, state.exact)
        exact = jax.tree.map(lambda p, change: p + rate * change, state.exact, changes)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def kept(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        exact = kept(exact, state.exact)
        short = state.masters is not None
        state = State(
            jax.tree.map(self._short, exact) if short else exact,
            exact if short else None,
            kept(optimizer, state.optimizer),
            state.step + 1,
            state.skipped + (~finite).astype(jnp.int32),
            state.frozen,
        )
        return state, Metrics(loss, norm, rate, finite, routing)

    @cached_property
    def step(self) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """`step(state, batch) -> state, metrics`; the state given is consumed."""
        return jax.jit(self.update, donate_argnums=0, out_shardings=(self.shardings, None))

    @cached_property
    def nll(self) -> Callable[[State, Batch], Array]:
        """`nll(state, batch)`: nats of every token, [B, T], whole on every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            lambda state, batch: self.token_loss(state.params, batch, state.frozen).nll,
            out_shardings=whole,
        )
