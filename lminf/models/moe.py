"""A mixture of experts: a router (routers.py) sends every token to a few of many MLPs.

The router's weights are those of the outputs. Two losses stabilise a learned one: the balance loss
is least when the experts share the tokens evenly, and the z-loss keeps the router's logits small.
Source: Fedus et al. 2022, arXiv:2101.03961; z-loss: Zoph et al. 2022, arXiv:2202.08906.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf.models.quantization import QuantizedWeights
from lminf.models.routers import BIAS, Routed, RoutedByExperts, RouterInput, expert_slots
from lminf.models.spec import MoESpec
from lminf.types import Hidden, Tokens

ROUTING = "routing"  # the Flax collection of router statistics
# Of each layer: the two losses; the share of choices that no buffer had room for; the share of all
# choices that fell on the busiest expert (1 / E: even); the share of tokens that no expert read.
MEASURES = ("balance", "z", "dropped", "largest", "unread")
LOAD = "load"  # of each layer too, [E]: each expert's share of all choices


class Experts(nn.Module):
    """The routed experts that replace an MLP."""

    spec: MoESpec
    width: int
    activated: Callable[[Array | None, Array], Array]  # (gate, up) -> what w_down is multiplied by
    gated: bool
    constrain: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Hidden, tokens: Tokens | None = None) -> Hidden:
        s, (B, T, D) = self.spec, x.shape
        flat = x.reshape(B * T, D)
        router_input = self.router_input(flat, None if tokens is None else tokens.reshape(B * T))
        routed = s.router.route(router_input, s.top_k, normalised=s.normalised)
        dropped = unread = jnp.float32(0)
        if isinstance(routed, RoutedByExperts):
            out, unread = self.gather_dispatch(flat, routed)
        elif s.capacity_factor is None:
            out = self.dense_dispatch(flat, routed)
        else:
            capacity = math.ceil(s.capacity_factor * s.top_k * B * T / s.experts)
            out, dropped, unread = self.capacity_dispatch(flat, routed, min(capacity, B * T))
        for name, value in (("balance", routed.balance), ("z", routed.z), ("dropped", dropped),
                            ("largest", routed.load.max()), ("unread", unread),
                            (LOAD, routed.load)):  # fmt: skip
            self.sow(ROUTING, name, value)
        return out.reshape(B, T, D)

    def router_input(self, x: Float[Array, "T D"], tokens: Array | None) -> RouterInput:
        """What the router goes by."""
        s = self.spec
        if not s.router.learned:
            return RouterInput(jnp.zeros((len(x), s.experts), jnp.float32), tokens, None)
        router = self.param("router", nn.initializers.lecun_normal(), (x.shape[1], s.experts))
        # float32: two experts that bfloat16 cannot tell apart would swap ranks.
        logits = x.astype(jnp.float32) @ router.astype(jnp.float32)
        if s.bias:
            bias = self.param("b_router", nn.initializers.zeros, (s.experts,))
            logits = logits + bias.astype(jnp.float32)[None]
        correction = None
        if s.router.bias_rate is not None:
            correction = self.param(BIAS, nn.initializers.zeros, (s.experts,))
        return RouterInput(logits, tokens, correction)

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
    ) -> tuple[Float[Array, "T D"], Float[Array, ""], Float[Array, ""]]:
        """Outputs where every expert reads at most `capacity` tokens, the share of dropped choices
        and that of tokens whose every choice was; an expert adds nothing to a token that it
        dropped.
        """
        E, (T, D) = self.spec.experts, x.shape
        slot, fits = expert_slots(routed.expert, E, capacity)
        row = jnp.where(fits, routed.expert * capacity + slot, E * capacity)  # the last: dropped
        copies = jnp.broadcast_to(x[:, None], (T, self.spec.top_k, D))
        buffers = jnp.zeros((E * capacity + 1, D), x.dtype).at[row].set(copies)[:-1]
        out = self.mlps(buffers.reshape(E, capacity, D)).reshape(-1, D)
        out = jnp.concatenate([out, jnp.zeros((1, D), out.dtype)])[row]  # [T, k, D]
        weight = jnp.where(fits, routed.weight, 0).astype(x.dtype)
        unread = 1 - fits.any(-1).mean(dtype=jnp.float32)
        return jnp.einsum("tkd,tk->td", out, weight), 1 - fits.mean(dtype=jnp.float32), unread

    def gather_dispatch(
        self, x: Float[Array, "T D"], routed: RoutedByExperts
    ) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
        """Outputs where every expert reads the tokens that it chose, and the share of tokens that
        none did.
        """
        out = self.mlps(x[routed.token]) * routed.weight[..., None].astype(x.dtype)
        read = jnp.zeros(len(x), bool).at[routed.token].set(True)
        return jnp.zeros_like(x).at[routed.token].add(out), 1 - read.mean(dtype=jnp.float32)

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
