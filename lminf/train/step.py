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
from lminf.errors import InputError
from lminf.models import decoder
from lminf.models.quantization import check_float
from lminf.models.routers import update_bias
from lminf.models.spec import ModelSpec
from lminf.objectives import terms
from lminf.objectives.terms import CrossEntropy, Term
from lminf.parallel import partition, pipeline
from lminf.parallel.attention import Sharded
from lminf.parallel.loss import token_loss
from lminf.parallel.partition import Strategy
from lminf.parallel.pipeline import Pipeline
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
    master_params: Params | None  # the float32 parameters, where `params` are something shorter
    optimizer: Any
    step: Any  # int32, batches seen
    skipped: Any  # int32, those that changed nothing because they gave no finite gradient
    frozen: Params | None = None  # the model, where `params` are adapters of it
    references: Mapping[str, Params] | None = None  # frozen models that the objective asks

    @property
    def params_f32(self) -> Params:
        """What is trained, in float32."""
        return self.params if self.master_params is None else self.master_params


class Metrics(NamedTuple):
    """Of one step; scalars on the device."""

    loss: Float[Array, ""]  # the term of that name: nats per token, or per pair
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Array  # bool; otherwise the step changed nothing
    reported: Mapping[str, Float[Array, ""]]  # what else the terms of the objective report


@dataclass(frozen=True)
class TrainStep:
    """A model, where it lies and how it learns: all that a compiled step depends on."""

    spec: ModelSpec
    policies: tuple[LayerPolicy, ...]  # [L]
    mesh: Mesh
    strategy: Strategy
    optimizer: optax.GradientTransformation  # for a learning rate of 1
    learning_rate: Callable[[Array], Array]  # of the step
    dtype: Any = jnp.float32  # of the computation
    remat: str = "none"
    grad_accum_steps: Annotated[int, Range(min=1)] = 1  # pieces of a batch, one after another
    clip: Annotated[float, Range(above=0)] | None = 1.0  # of the gradient's norm
    objective: tuple[Term, ...] = (CrossEntropy(),)  # what is minimised: the sum of these
    lora: LoRA | None = None  # adapters to train, instead of the model
    pipeline: Pipeline | None = None  # over the mesh's stages, beside the strategy

    def __post_init__(self):
        ranges.check(self)
        for policy in self.policies:
            if policy.needs_prompt:
                raise InputError(
                    f"{policy.name} acts at the end of a prompt, and training has none; train "
                    f"under another policy, such as lm_infinite"
                )
        if self.pipeline is not None:
            pipeline.check(self.pipeline, self.spec, self.mesh, self.objective)
            if self.lora is not None:
                raise InputError("adapters have no pipeline yet; leave lora or the pipeline out")
            if self.grad_accum_steps > 1:
                raise InputError(
                    f"grad_accum_steps={self.grad_accum_steps}: a pipeline cuts a batch into its "
                    f"microbatches; set pipeline microbatches, and grad_accum_steps to 1"
                )

    @cached_property
    def module(self) -> decoder.Decoder:
        return decoder.Decoder(
            self.spec,
            self.policies,
            dtype=self.dtype,
            remat=REMAT[self.remat],
            prefill=Sharded(self.mesh, self.strategy),
            constrain=partition.Constrain(self.mesh, self.strategy),
        )

    @property
    def pieces(self) -> int:
        """Parts of a batch that are computed one after another."""
        return (
            self.grad_accum_steps
            if self.pipeline is None
            else self.pipeline.num_microbatches(self.mesh)
        )

    # --- State ------------------------------------------------------------------------------------

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the frozen models that the objective compares with, of the model's own shape."""
        return tuple(dict.fromkeys(name for term in self.objective for name in term.references))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that every batch must hold."""
        return tuple(dict.fromkeys(name for term in self.objective for name in term.arrays))

    def state_of(self, params: Params, references: Mapping[str, Params] | None = None) -> State:
        """The state before the first step, from float32 parameters; traceable.

        A reference that is not given is the model before its first step.
        """
        models = {name: (references or {}).get(name, params) for name in self.references}
        frozen_models = jax.tree.map(self._short, models) or None
        zero = jnp.zeros((), jnp.int32)
        if self.lora is not None:
            adapters = self.lora.init(params, key=jax.random.key(0))
            frozen = jax.tree.map(self._short, params)
            optimizer = self.optimizer.init(adapters)
            return State(adapters, None, optimizer, zero, zero, frozen, frozen_models)
        optimizer = self.optimizer.init(params)
        if self.dtype == jnp.float32:
            return State(params, None, optimizer, zero, zero, None, frozen_models)
        short = jax.tree.map(self._short, params)
        return State(short, params, optimizer, zero, zero, None, frozen_models)

    def _short(self, leaf):
        return leaf.astype(self.dtype)

    @cached_property
    def shapes(self) -> State:
        return jax.eval_shape(self._fresh, jax.random.key(0))

    @cached_property
    def shardings(self) -> State:
        """Where every array of the state lies."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        references = None
        if self.shapes.references is not None:
            references = {
                name: self._laid_out(model, self.strategy.params)
                for name, model in self.shapes.references.items()
            }
        if self.shapes.frozen is not None:  # adapters are small, and whole on every device
            everywhere = jax.tree.map(lambda _: replicated, self.shapes)
            frozen = self._laid_out(self.shapes.frozen, self.strategy.params)
            return everywhere._replace(frozen=frozen, references=references)
        laid_out = partial(self._laid_out, self.shapes.params)
        opt = laid_out(self.strategy.opt)
        exact = laid_out(self.strategy.params) if self.shapes.master_params is None else opt
        return State(
            exact if self.shapes.master_params is None else laid_out(self.strategy.params),
            None if self.shapes.master_params is None else opt,
            partition.optimizer_shardings(
                self.shapes.optimizer, self.shapes.params, opt, self.mesh
            ),
            replicated,
            replicated,
            None,
            references,
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

    def start(self, params: Params, references: Mapping[str, Params] | None = None) -> State:
        """The state before the first step of continuing with these parameters.

        A reference that is not given is this model.
        """
        check_float((params, references), purpose="training")
        exact, frozen = (
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
            for tree in (params, dict(references or {}))
        )
        return jax.jit(self.state_of, out_shardings=self.shardings)(exact, frozen)

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
            return state.params_f32
        return jax.jit(self.weights, out_shardings=self.shardings.frozen)(
            state.params, state.frozen
        )

    def token_loss(
        self, params: Params, batch: Batch, frozen: Params | None = None
    ) -> terms.TokenLoss:
        """The loss of every token."""
        return self.model(self.weights(params, frozen), batch).token_loss()

    def model(self, params: Params, batch: Batch) -> terms.Model:
        """The model on a batch, inside one traced loss."""
        score = partial(token_loss, self.spec, mesh=self.mesh, strategy=self.strategy)
        return terms.Model(self.module, params, batch, score=score)

    def loss_fn(
        self, state: State, batch: Batch, weights: tuple[Float[Array, ""], ...]
    ) -> Callable[[Params], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]:
        """The function of what is trained: this batch's part of what is minimised and reported."""

        def loss(params):
            model = self.model(self.weights(params, state.frozen), batch)
            references = {
                name: self.model(frozen, batch) for name, frozen in (state.references or {}).items()
            }
            return terms.evaluate(self.objective, model, references, weights)

        return loss

    def gradients(
        self, params: Params, batch: Batch, state: State | None = None
    ) -> tuple[dict[str, Float[Array, ""]], Params]:
        """What the terms report (`loss` in nats per token), and the gradient of their sum, laid out
        by the strategy. `state` holds the frozen models, where there are any.
        """
        if self.pipeline is not None:
            reported, gradient = pipeline.gradients(
                self.pipeline, self.module, params, batch, mesh=self.mesh, strategy=self.strategy,
                objective=self.objective,
            )  # fmt: skip
            return reported, jax.lax.with_sharding_constraint(gradient, self.gradient_shardings)
        state = State(params, None, None, None, None) if state is None else state
        weights = tuple(term.weight(batch) for term in self.objective)
        laid_out = self.gradient_shardings

        def one(piece):
            loss = self.loss_fn(state, piece, weights)
            gradient, reported = jax.grad(loss, has_aux=True)(params)
            return reported, jax.lax.with_sharding_constraint(gradient, laid_out)

        if self.grad_accum_steps == 1:
            return one(batch)

        def add(carry, piece):
            so_far, summed = carry
            reported, gradient = one(piece)
            summed = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), summed, gradient)
            so_far = jax.tree.map(jnp.add, so_far, reported)
            return (so_far, jax.lax.with_sharding_constraint(summed, laid_out)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zeros = jax.lax.with_sharding_constraint(zeros, laid_out)
        pieces = jax.tree.map(self._pieces, dict(batch))
        first = jax.tree.map(lambda x: x[0], pieces)
        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda b: one(b)[0], first)
        )
        (reported, summed), _ = jax.lax.scan(add, (nothing, zeros), pieces)
        return reported, summed

    def _pieces(self, x):
        """[B, ...] -> [A, B / A, ...] of A accumulation steps; every device cuts its own rows."""
        rows = x.reshape(x.shape[0] // self.grad_accum_steps, self.grad_accum_steps, *x.shape[1:])
        rows = rows.swapaxes(0, 1)
        axes = (None, "batch", "length", *[None] * x.ndim)[: rows.ndim]
        where = partition.spec(axes, rows.shape, self.strategy.activations, self.mesh)
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, where))

    # --- Step -------------------------------------------------------------------------------------

    def update(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        reported, gradient = self.gradients(state.params, batch, state)
        loss, load = reported.pop("loss"), reported.pop(terms.EXPERT_LOAD, None)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        norm = optax.tree.norm(gradient)
        if self.clip is not None:
            factor = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        learning_rate = self.learning_rate(state.step)
        changes, optimizer = self.optimizer.update(gradient, state.optimizer, state.params_f32)
        exact = jax.tree.map(
            lambda p, change: p + learning_rate * change, state.params_f32, changes
        )
        if load is not None and self.lora is None:  # under adapters the router stays as it is
            rate = self.spec.moe and self.spec.moe.router.bias_rate
            assert rate is not None
            exact = update_bias(exact, rate, load)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def kept(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        exact = kept(exact, state.params_f32)
        short = state.master_params is not None
        state = State(
            jax.tree.map(self._short, exact) if short else exact,
            exact if short else None,
            kept(optimizer, state.optimizer),
            state.step + 1,
            state.skipped + (~finite).astype(jnp.int32),
            state.frozen,
            state.references,
        )
        return state, Metrics(loss, norm, learning_rate, finite, reported)

    @cached_property
    def step(self) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """`step(state, batch) -> state, metrics`; the state given is consumed."""
        return jax.jit(self.update, donate_argnums=0, out_shardings=(self.shardings, None))

    @cached_property
    def nll(self) -> Callable[[State, Batch], Array]:
        """`nll(state, batch)`: nats of every token, [B, T], whole on every device."""

        def nll(state, batch):
            if self.pipeline is None:
                return self.token_loss(state.params, batch, state.frozen).nll
            return pipeline.token_nll(
                self.pipeline, self.module, state.params, batch, mesh=self.mesh,
                strategy=self.strategy,
            )  # fmt: skip

        return jax.jit(nll, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
