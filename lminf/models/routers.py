"""Which experts of a mixture read which tokens: four routers behind one call, `route`.

    TokenChoice    every token takes its likeliest experts                       arXiv:2101.03961
    LossFree       the same, of scores moved by a bias that evens the load out   arXiv:2408.15664
    Hash           the token's id says its experts; nothing is learned           arXiv:2106.04426
    ExpertChoice   every expert takes its likeliest tokens                       arXiv:2202.09368

(Fine-grained and shared experts, arXiv:2401.06066, are a shape and not a router:
`MoESpec.fine_grained`.)

A router that is not `causal` looks at later tokens. In a language model that is a leak: which
experts read a token then depends on the tokens that it should predict, and while a text is written
those do not exist yet. `lminf.models.decoder` refuses to decode with one.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from lminf import ranges
from lminf.ranges import Range
from lminf.types import Params

BIAS = "correction_bias"  # the parameter of LossFree, [E] in each layer


class RouterInput(NamedTuple):
    """The inputs that a router may use."""

    logits: Float[Array, "T E"]  # float32; zeros where the router learns nothing
    tokens: Int[Array, " T"] | None  # their ids, for a router that reads `tokens`
    bias: Float[Array, " E"] | None  # for a router that has a `bias_rate`


class Routed(NamedTuple):
    """The experts of every token, the heaviest first, and the router's two losses."""

    expert: Int[Array, "T k"]
    weight: Float[Array, "T k"]  # float32
    load: Float[Array, " E"]  # each expert's share of all choices
    balance: Float[Array, ""]  # 1 where all experts have equal shares, up to E where one has all
    z: Float[Array, ""]  # mean squared log of the softmax's denominator


class RoutedByExperts(NamedTuple):
    """The tokens of every expert, and the same measures."""

    token: Int[Array, "E C"]
    weight: Float[Array, "E C"]  # float32
    load: Float[Array, " E"]
    balance: Float[Array, ""]
    z: Float[Array, ""]


@runtime_checkable
class Router(Protocol):
    """A frozen dataclass: a compiled step depends on it."""

    @property
    def causal(self) -> bool:
        """Whether an earlier token's experts do not depend on later tokens."""
        ...

    @property
    def learned(self) -> bool:
        """Whether it has a weight matrix from hidden states to logits."""
        ...

    @property
    def reads_tokens(self) -> bool:
        """Whether it needs token ids, which inputs given as embeddings lack."""
        ...

    @property
    def bias_rate(self) -> float | None:
        """The step size of the bias update after a training step; None: no bias."""
        ...

    @property
    def balance_scale(self) -> float:
        """The default coefficient of the load-balancing loss in pretraining."""
        ...

    def route(
        self, inputs: RouterInput, top_k: int, *, normalised: bool
    ) -> Routed | RoutedByExperts:
        """The assignment of all tokens; `top_k` is experts per token, on average where the router
        does not fix it. `normalised`: the weights of a token's experts sum to 1.
        """
        ...


@dataclass(frozen=True)
class TokenChoice:
    """Every token takes the top_k experts of the softmax over all of them.

    Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2022, arXiv:2101.03961.
    """

    causal, learned, reads_tokens, bias_rate, balance_scale = True, True, False, None, 0.01

    def route(self, inputs: RouterInput, top_k: int, *, normalised: bool) -> Routed:
        probabilities = jax.nn.softmax(inputs.logits.astype(jnp.float32), axis=-1)
        weight, expert = jax.lax.top_k(probabilities, top_k)
        return routed(inputs.logits, probabilities, expert, weight, normalised=normalised)


TOKEN_CHOICE = TokenChoice()  # that of released models


@dataclass(frozen=True)
class LossFree:
    """Token choice of scores plus a bias that only the choice sees; the weights are the scores'.

    After a step every bias moves by `bias_rate`: up where the expert read fewer tokens than the
    mean, down where it read more (`update_bias`). Nothing is added to the loss.
    Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1, with a softmax for their sigmoid.
    """

    bias_rate: Annotated[float, Range(above=0, max=1)] = 0.001  # of a step, as a probability

    causal, learned, reads_tokens, balance_scale = True, True, False, 0.0

    def __post_init__(self):
        ranges.check(self)

    def route(self, inputs: RouterInput, top_k: int, *, normalised: bool) -> Routed:
        assert inputs.bias is not None
        probabilities = jax.nn.softmax(inputs.logits.astype(jnp.float32), axis=-1)
        _, expert = jax.lax.top_k(probabilities + inputs.bias.astype(jnp.float32)[None], top_k)
        weight = jnp.take_along_axis(probabilities, expert, axis=-1)
        return routed(inputs.logits, probabilities, expert, weight, normalised=normalised)


@dataclass(frozen=True)
class Hash:
    """top_k experts from a hash of the token's id, the same in all layers, with equal weights.

    The paper's random hash: how even the load is depends on how often each token occurs, so with a
    small vocabulary it is uneven.
    Source: Roller et al. 2021, arXiv:2106.04426, section 3.1.
    """

    causal, learned, reads_tokens, bias_rate, balance_scale = True, False, True, None, 0.0

    def route(self, inputs: RouterInput, top_k: int, *, normalised: bool) -> Routed:
        del normalised  # they always are: there are no scores
        assert inputs.tokens is not None
        experts = inputs.logits.shape[-1]
        first = (hash_ids(inputs.tokens) % experts).astype(jnp.int32)
        expert = (first[:, None] + jnp.arange(top_k, dtype=jnp.int32)[None]) % experts
        weight = jnp.full(expert.shape, 1 / top_k, jnp.float32)
        even = jnp.full_like(inputs.logits, 1 / experts)
        return routed(inputs.logits, even, expert, weight, normalised=False)


@dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes the T top_k / E tokens of the batch that its softmax score is highest for:
    the load is even by construction, and a token may be read by any number of experts.

    A score is compared with those of all tokens, later ones and other rows included, so a loss
    measured on whole texts is not that of a model which predicts them one token after another.
    Source: Zhou et al. 2022, arXiv:2202.09368, equations 1 and 2.
    """

    causal, learned, reads_tokens, bias_rate, balance_scale = False, True, False, None, 0.0

    def route(self, inputs: RouterInput, top_k: int, *, normalised: bool) -> RoutedByExperts:
        assert not normalised  # MoESpec refuses it
        tokens, experts = inputs.logits.shape
        logits = inputs.logits.astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1)
        weight, token = jax.lax.top_k(scores.T, math.ceil(top_k * tokens / experts))
        even = jnp.full(experts, 1 / experts, jnp.float32)
        return RoutedByExperts(token, weight, even, jnp.float32(1), z_loss(logits))


ROUTERS: dict[str, type] = {
    "token_choice": TokenChoice,
    "loss_free": LossFree,
    "hash": Hash,
    "expert_choice": ExpertChoice,
}


def routed(
    logits: Float[Array, "T E"],
    probabilities: Float[Array, "T E"],
    expert: Int[Array, "T k"],
    weight: Float[Array, "T k"],
    *,
    normalised: bool,
) -> Routed:
    """The assignment with its load and auxiliary losses."""
    experts = logits.shape[-1]
    if normalised:
        weight = weight / weight.sum(-1, keepdims=True)
    load = jax.nn.one_hot(expert, experts).mean((0, 1))  # share of the tokens: no gradient
    balance = experts * (load * probabilities.mean(0)).sum()
    return Routed(expert, weight, load, balance, z_loss(logits))


def z_loss(logits: Float[Array, "T E"]) -> Float[Array, ""]:
    """The z-loss. Source: Zoph et al. 2022, arXiv:2202.08906."""
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.square(lse).mean()


def hash_ids(tokens: Int[Array, " T"]) -> UInt32[Array, " T"]:
    """32 bits in which neighbouring ids have nothing in common (the finaliser of MurmurHash3)."""
    x = tokens.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def expert_slots(
    expert: Int[Array, "T k"], experts: int, capacity: int
) -> tuple[Int[Array, "T k"], Bool[Array, "T k"]]:
    """Each choice's slot in its expert's buffer, and whether the buffer of `capacity` has it.

    First choices of all tokens get slots before second ones; earlier tokens before later ones.
    """
    chosen = jax.nn.one_hot(expert.T.reshape(-1), experts, dtype=jnp.int32)  # [k T, E]
    earlier_choices = jnp.cumsum(chosen, axis=0) - chosen
    slot = (earlier_choices * chosen).sum(-1).reshape(expert.shape[::-1]).T
    return slot, slot < capacity


def update_bias(params: Params, bias_rate: float, load: Float[Array, "L E"]) -> Params:
    """The parameters with the correction bias of every expert moved by the sign of its load error.

    Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1: b += u sign(mean load - load).
    """
    error = load.mean(-1, keepdims=True) - load
    moe = params["layers"]["moe"]
    moe = {**moe, BIAS: moe[BIAS] + bias_rate * jnp.sign(error)}
    return {**params, "layers": {**params["layers"], "moe": moe}}
