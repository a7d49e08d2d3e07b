"""A mixture of experts: a router sends every token to a few of many MLPs.

The router's softmax over all experts weights the outputs of the chosen ones. Two losses stabilise
it: the balance loss is least when the experts share the tokens evenly, and the z-loss keeps the
router's logits small.
Source: Fedus et al. 2022, arXiv:2101.03961; z-loss: Zoph et al. 2022, arXiv:2202.08906.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.models.quantization import QuantizedWeights
from lminf.models.spec import MoESpec
from lminf.types import Hidden

ROUTING = "routing"  # the Flax collection of router statistics
MEASURES = ("balance", "z", "dropped")  # of each layer


class Routed(NamedTuple):
    """The experts of every token, the heaviest first, and the router's two losses."""

    expert: Int[Array, "T k"]
    weight: Float[Array, "T k"]  # float32
    balance: Float[Array, ""]  # 1 where all experts have equal shares, up to E where one has all
    z: Float[Array, ""]  # mean squared log of the softmax's denominator


def route(logits: Float[Array, "T E"], top_k: int, *, normalised: bool) -> Routed:
    """The top_k experts of every token, from the router's logits; float32."""
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weight, expert = jax.lax.top_k(probabilities, top_k)
    if normalised:
        weight = weight / weight.sum(-1, keepdims=True)
    load = jax.nn.one_hot(expert, experts).mean((0, 1))  # share of the tokens: no gradient
    balance = experts * (load * probabilities.mean(0)).sum()
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return Routed(expert, weight, balance, jnp.square(lse).mean())


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


class Experts(nn.Module):
    """The routed experts that replace an MLP."""

    spec: MoESpec
    width: int
    activated: Callable[[Array | None, Array], Array]  # (gate, up) -> what w_down is multiplied by
    gated: bool
    constrain: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        s, (B, T, D) = self.spec, x.shape
        router = self.param("router", nn.initializers.lecun_normal(), (D, s.experts))
        flat = x.reshape(B * T, D)
        # float32: two experts that bfloat16 cannot tell apart would swap ranks.
        logits = flat.astype(jnp.float32) @ router.astype(jnp.float32)
        if s.bias:
            bias = self.param("b_router", nn.initializers.zeros, (s.experts,))
            logits = logits + bias.astype(jnp.float32)[None]
        routed = route(logits, s.top_k, normalised=s.normalised)
        if s.capacity_factor is None:
            out, dropped = self.dense_dispatch(flat, routed), jnp.float32(0)
        else:
            capacity = math.ceil(s.capacity_factor * s.top_k * B * T / s.experts)
            out, dropped = self.capacity_dispatch(flat, routed, min(capacity, B * T))
        self.sow(ROUTING, "balance", routed.balance)
        self.sow(ROUTING, "z", routed.z)
        self.sow(ROUTING, "dropped", dropped)  # share of the choices
        return out.reshape(B, T, D)

    def dense_dispatch(self, x: Float[Array, "T D"], routed: Routed) -> Float[Array, "T D"]:
        """Outputs without dropped tokens: every expert reads every token, and has weight 0 where it
        was not chosen.

        E / k times the work that is needed, in plain products that shard over any mesh.
        """
        E = self.spec.experts
        weight = (jax.nn.one_hot(routed.expert, E) * routed.weight[..., None]).sum(1)  # [T, E]
        out = self.mlps(jnp.broadcast_to(x, (E, *x.shape)))
        return jnp.einsum("etd,te->td", out, weight.astype(x.dtype))

    def capacity_dispatch(
        self, x: Float[Array, "T D"], routed: Routed, capacity: int
    ) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
        """Outputs where every expert reads at most `capacity` tokens, and the share of dropped
        choices; an expert adds nothing to a token that it dropped.
        """
        E, (T, D) = self.spec.experts, x.shape
        slot, fits = expert_slots(routed.expert, E, capacity)
        row = jnp.where(fits, routed.expert * capacity + slot, E * capacity)  # the last: dropped
        copies = jnp.broadcast_to(x[:, None], (T, self.spec.top_k, D))
        buffers = jnp.zeros((E * capacity + 1, D), x.dtype).at[row].set(copies)[:-1]
        out = self.mlps(buffers.reshape(E, capacity, D)).reshape(-1, D)
        out = jnp.concatenate([out, jnp.zeros((1, D), out.dtype)])[row]  # [T, k, D]
        weight = jnp.where(fits, routed.weight, 0).astype(x.dtype)
        return jnp.einsum("tkd,tk->td", out, weight), 1 - fits.mean(dtype=jnp.float32)

    def mlps(self, x: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """Each expert's MLP of its tokens."""
        s = self.spec
        init = nn.initializers.lecun_normal(batch_axis=0)

        def project(x, name, columns):
            w = self.param(name, init, (s.experts, x.shape[2], columns))
            if isinstance(w, QuantizedWeights):
                values = w.qvalue.astype(x.dtype)
                y = jnp.einsum("eci,eio->eco", x, values, preferred_element_type=jnp.float32)
                y = (y * w.scale).astype(x.dtype)
            else:
                y = jnp.einsum("eci,eio->eco", x, w.astype(x.dtype))
            if not s.bias:
                return y
            bias = self.param(f"b_{name}", nn.initializers.zeros, (s.experts, columns))
            return y + bias.astype(x.dtype)[:, None]

        x = self.constrain(x, "expert", None, None)
        up = project(x, "up", s.hidden_dim)
        up = self.activated(project(x, "gate", s.hidden_dim) if self.gated else None, up)
        up = self.constrain(up, "expert", None, "mlp")
        return self.constrain(project(up, "down", self.width), "expert", None, None)
