"""What training minimises: a sum of terms, each the mean of something over its batch.

    minimised = Σ over terms of scale · (Σ over the batch) / weight

A term reads the arrays that it declares, asks the model (and frozen reference models) for what it
needs and returns a sum; the step divides by the weight, which is known before the model runs, so a
batch may be cut into pieces. A new objective is a term; the step does not change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf import ranges
from lminf.models import decoder, moe
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.types import Hidden, Params

Batch = Mapping[str, Array]


class TokenLoss(NamedTuple):
    """Of every token, float32."""

    nll: Float[Array, "B T"]  # nats
    lse: Float[Array, "B T"]  # log of the sum of exponentials, which z-loss keeps small


class Model:
    """A model with its parameters inside one traced loss: what several terms ask is computed once.

    `prefix` chooses among sequences of a batch: with "chosen_" the arrays chosen_tokens,
    chosen_targets and so on.
    """

    def __init__(
        self,
        module: decoder.Decoder,
        params: Params,
        batch: Batch,
        *,
        score: Callable[[Params, Hidden, Array], TokenLoss],
    ):
        self.module, self.params, self.batch = module, params, batch
        self._score = score
        self._forward: dict[str, tuple[Hidden, Mapping[str, Array]]] = {}
        self._losses: dict[str, TokenLoss] = {}

    @property
    def spec(self) -> ModelSpec:
        return self.module.spec

    def hidden(self, prefix: str = "") -> Hidden:
        """Final hidden states [B, T, D] of the sequences `{prefix}tokens`."""
        return self._run(prefix)[0]

    def routing(self, prefix: str = "") -> Mapping[str, Float[Array, ""]]:
        """Of a mixture of experts: the means over layers of moe.MEASURES; otherwise empty."""
        by_layer = self._run(prefix)[1]
        return {name: by_layer[name].mean() for name in moe.MEASURES if name in by_layer}

    def expert_load(self) -> Float[Array, "L E"]:
        """Of a mixture of experts: each expert's share of the choices in its layer."""
        return self._run("")[1][moe.LOAD]

    def token_loss(self, prefix: str = "") -> TokenLoss:
        """The loss of every token of `{prefix}targets`."""
        if prefix not in self._losses:
            targets = self.batch[f"{prefix}targets"]
            self._losses[prefix] = self._score(self.params, self.hidden(prefix), targets)
        return self._losses[prefix]

    def _run(self, prefix: str) -> tuple[Hidden, Mapping[str, Array]]:
        if prefix in self._forward:
            return self._forward[prefix]
        tokens = self.batch[f"{prefix}tokens"]
        positions = self.batch.get(f"{prefix}positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        applied: Any = self.module.apply(
            {"params": self.params}, tokens, positions=positions,
            segments=self.batch.get(f"{prefix}segments"), mutable=[moe.ROUTING],
        )  # fmt: skip
        (hidden, _), sown = applied
        routing = {}
        if self.spec.moe is not None:
            measured = sown[moe.ROUTING]["layers"]["moe"]
            routing = {name: value for name, (value,) in measured.items()}
        self._forward[prefix] = hidden, routing
        return self._forward[prefix]


@runtime_checkable
class Term(Protocol):
    """One addend of what is minimised. A frozen dataclass: a compiled step depends on it."""

    @property
    def scale(self) -> float:
        """The factor of its mean in what is minimised."""
        ...

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a batch must hold for it."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the frozen models that it compares with."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """What the sum over the whole batch is divided by. Of a piece of it, the piece's part."""
        ...

    def __call__(
        self, model: Model, references: Mapping[str, Model]
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """The sum over the model's batch, and sums to be reported, divided by the same weight."""
        ...


def token_weights(batch: Batch, prefix: str = "") -> Float[Array, "B T"]:
    """How much each target counts: the batch's weights, or 1."""
    targets = batch[f"{prefix}targets"]
    weights = batch.get(f"{prefix}weights")
    return jnp.ones(targets.shape, jnp.float32) if weights is None else weights


def _counted(batch: Batch, prefix: str = "") -> Float[Array, ""]:
    """The targets that count, at least 1."""
    weights = batch.get(f"{prefix}weights")
    total = jnp.float32(batch[f"{prefix}targets"].size) if weights is None else weights.sum()
    return jnp.maximum(total, 1.0)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of the next token, nats per token; reported as `loss`.

    With a `prefix`, of the sequences `{prefix}tokens`: "chosen_" makes it fine-tuning on the better
    answers of pairs.
    """

    scale: Annotated[float, Range(above=0)] = 1.0
    prefix: str = ""

    references = ()

    def __post_init__(self):
        ranges.check(self)

    @property
    def arrays(self) -> tuple[str, ...]:
        return f"{self.prefix}tokens", f"{self.prefix}targets"

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return _counted(batch, self.prefix)

    def __call__(self, model, references):
        weights = token_weights(model.batch, self.prefix)
        total = (weights * model.token_loss(self.prefix).nll).sum()
        return total, {"loss": total}


@dataclass(frozen=True)
class ZLoss:
    """Squared log of the softmax's denominator, which keeps logits from drifting."""

    scale: Annotated[float, Range(above=0)]

    arrays = ("tokens", "targets")
    references = ()

    def __post_init__(self):
        ranges.check(self)

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return _counted(batch)

    def __call__(self, model, references):
        return (token_weights(model.batch) * jnp.square(model.token_loss().lse)).sum(), {}


@dataclass(frozen=True)
class _OfRouters:
    """The mean over layers of one measure of a mixture's routers, all tokens alike."""

    arrays = ("tokens", "targets")
    references = ()

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return jnp.float32(batch["tokens"].size)

    def _sum(self, model: Model, name: str):
        tokens = jnp.float32(model.batch["tokens"].size)
        return model.routing()[name] * tokens


@dataclass(frozen=True)
class RouterBalance(_OfRouters):
    """Least where the experts share the tokens evenly. Source: Fedus et al. 2022,
    arXiv:2101.03961; reported with the routers' other measures."""

    scale: Annotated[float, Range(min=0)] = 0.01

    def __post_init__(self):
        ranges.check(self)

    def __call__(self, model, references):
        reported = {f"router_{name}": self._sum(model, name) for name in moe.MEASURES}
        return reported["router_balance"], reported


@dataclass(frozen=True)
class RouterZ(_OfRouters):
    """Keeps the routers' logits small. Source: Zoph et al. 2022, arXiv:2202.08906."""

    scale: Annotated[float, Range(min=0)] = 0.001

    def __post_init__(self):
        ranges.check(self)

    def __call__(self, model, references):
        return self._sum(model, "z"), {}


EXPERT_LOAD = "expert_load"  # what the step moves correction biases by; not a metric


@dataclass(frozen=True)
class ExpertLoad(_OfRouters):
    """Nothing to minimise: tells the step the load of every expert, by which it moves the biases of
    a router that is balanced without a loss (lminf.models.routers.LossFree).
    """

    scale = 0.0

    def __call__(self, model, references):
        load = model.expert_load() * self.weight(model.batch)
        return jnp.float32(0), {EXPERT_LOAD: load}


def language_modeling(spec: ModelSpec, *, z_loss: float = 0.0) -> tuple[Term, ...]:
    """The terms of pretraining: the cross-entropy, z-loss where it has a weight, and of a mixture
    of experts its routers' losses."""
    terms: tuple[Term, ...] = (CrossEntropy(),)
    if z_loss:
        terms += (ZLoss(z_loss),)
    if spec.moe is not None:
        router = spec.moe.router
        terms += (RouterBalance(router.balance_scale), RouterZ())
        terms += (ExpertLoad(),) if router.bias_rate is not None else ()
    return terms


def evaluate(
    terms: tuple[Term, ...],
    model: Model,
    references: Mapping[str, Model],
    weights: tuple[Float[Array, ""], ...],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The model's batch's part of what is minimised, and of what is reported."""
    minimised, reported = jnp.float32(0), {}
    for term, weight in zip(terms, weights, strict=True):
        total, values = term(model, references)
        minimised += term.scale * total / weight
        reported |= {name: jax.lax.stop_gradient(x) / weight for name, x in values.items()}
    return minimised, reported
