"""A mixture of experts: every token goes to the few MLPs that a router gives it.

The router's softmax over all experts weighs what the chosen ones return. Two losses keep it sound:
one is least when the experts share the tokens evenly, the other keeps the router's logits small.
Source: Fedus et al. 2022, arXiv:2101.03961; z-loss: Zoph et al. 2022, arXiv:2202.08906.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf.models.spec import MoESpec
from lminf.types import Hidden

ROUTING = "routing"  # the collection of what routers did
MEASURES = ("balance", "z", "dropped")  # in it, of each layer


class Routed(NamedTuple):
    """Of every token and each of its k experts, the heaviest first."""

    expert: Int[Array, "T k"]
    weight: Float[Array, "T k"]  # float32
    balance: Float[Array, ""]  # 1 where all experts have equal shares, up to E where one has all
    z: Float[Array, ""]  # mean squared log of the softmax's denominator


def route(logits: Float[Array, "T E"], per_token: int, *, normalised: bool) -> Routed:
    """Where every token goes; float32."""
    experts = logits.shape[-1]
    share = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weight, expert = jax.lax.top_k(share, per_token)
    if normalised:
        weight = weight / weight.sum(-1, keepdims=True)
    chosen = jax.nn.one_hot(expert, experts).mean((0, 1))  # share of the tokens: no gradient
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return Routed(expert, weight, experts * (chosen * share.mean(0)).sum(), jnp.square(lse).mean())


def seats(
    expert: Int[Array, "T k"], experts: int, capacity: int
) -> tuple[Int[Array, "T k"], Bool[Array, "T k"]]:
    """The place of every choice among its expert's, and whether that is within its capacity.

    First choices of all tokens are seated before second ones; earlier tokens before later ones.
    """
    order = jax.nn.one_hot(expert.T.reshape(-1), experts, dtype=jnp.int32)  # [k T, E]
    before = jnp.cumsum(order, axis=0) - order
    place = (before * order).sum(-1).reshape(expert.shape[::-1]).T
    return place, place < capacity


class Experts(nn.Module):
    """The routed experts, in an MLP's place."""

    spec: MoESpec
    width: int
    act: Callable
    gated: bool
    place: Any

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        s, (B, T, D) = self.spec, x.shape
        router = self.param("router", nn.initializers.lecun_normal(), (D, s.experts))
        flat = x.reshape(B * T, D)
        # float32: two experts that bfloat16 cannot tell apart would swap places.
        logits = flat.astype(jnp.float32) @ router.astype(jnp.float32)
        routed = route(logits, s.per_token, normalised=s.normalised)
        if s.capacity is None:
            out, dropped = self.everywhere(flat, routed), jnp.float32(0)
        else:
            room = math.ceil(s.capacity * s.per_token * B * T / s.experts)
            out, dropped = self.seated(flat, routed, min(room, B * T))
        self.sow(ROUTING, "balance", routed.balance)
        self.sow(ROUTING, "z", routed.z)
        self.sow(ROUTING, "dropped", dropped)  # share of the choices
        return out.reshape(B, T, D)

    def everywhere(self, x: Float[Array, "T D"], routed: Routed) -> Float[Array, "T D"]:
        """Dropless: every expert reads every token, and weighs nothing where it was not chosen.

        E / k times the work that is needed, in plain products that lie on any mesh.
        """
        E = self.spec.experts
        weight = (jax.nn.one_hot(routed.expert, E) * routed.weight[..., None]).sum(1)  # [T, E]
        out = self.mlps(jnp.broadcast_to(x, (E, *x.shape)))
        return jnp.einsum("etd,te->td", out, weight.astype(x.dtype))

    def seated(self, x: Float[Array, "T D"], routed: Routed, capacity: int):
        """Every expert reads `capacity` tokens; for the rest of its tokens it returns nothing."""
        E, (T, D) = self.spec.experts, x.shape
        place, fits = seats(routed.expert, E, capacity)
        slot = jnp.where(fits, routed.expert * capacity + place, E * capacity)  # the last: nobody's
        read = jnp.broadcast_to(x[:, None], (T, self.spec.per_token, D))
        held = jnp.zeros((E * capacity + 1, D), x.dtype).at[slot].set(read)[:-1]
        out = self.mlps(held.reshape(E, capacity, D)).reshape(-1, D)
        out = jnp.concatenate([out, jnp.zeros((1, D), out.dtype)])[slot]  # [T, k, D]
        weight = jnp.where(fits, routed.weight, 0).astype(x.dtype)
        return jnp.einsum("tkd,tk->td", out, weight), 1 - fits.mean(dtype=jnp.float32)

    def mlps(self, x: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """What every expert makes of its own tokens."""
        s = self.spec
        init = nn.initializers.lecun_normal(batch_axis=0)

        def weight(name, rows, columns):
            return self.param(name, init, (s.experts, rows, columns)).astype(x.dtype)

        x = self.place(x, "expert", None, None)
        up = jnp.einsum("ecd,edf->ecf", x, weight("up", self.width, s.hidden_dim))
        if self.gated:
            gate = jnp.einsum("ecd,edf->ecf", x, weight("gate", self.width, s.hidden_dim))
            up = self.act(gate) * up
        else:
            up = self.act(up)
        up = self.place(up, "expert", None, "mlp")
        out = jnp.einsum("ecf,efd->ecd", up, weight("down", s.hidden_dim, self.width))
        return self.place(out, "expert", None, None)
