"""Training the first and the last layers of a model with its embeddings; those between are frozen.

Little text of a new language is learnt best so ("2x2 LS" where two layers at either end are
trained), and chat behaviour can be restored afterwards (lminf.surgery.interpolate). Weights
of frozen layers get no gradient, which saves a third of their backward pass. Source: Yamaguchi et
al. 2024, arXiv:2406.11477, section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.attention import attend
from lminf.attention.policy import FULL
from lminf.errors import InputError
from lminf.models import decoder, heads
from lminf.models.layers import Block, Norm
from lminf.models.quantization import check_float
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.types import Hidden, Params, Tokens

TABLES = ("embed", "head", "head_bias", "positions")


@dataclass(frozen=True)
class OuterLayers:
    """The loss of lminf.train.frozen: mean nats of the targets of a batch, by what is trained and
    the rest of a model, as `split` divides it.
    """

    spec: ModelSpec
    layers: Annotated[int, Range(min=1, max=2**11)]  # at either end

    def __post_init__(self):
        ranges.check(self)
        spec = self.spec
        alike = set(spec.windows) == {None} and not spec.layer_encodings and spec.moe is None
        if not alike or spec.sinks:
            raise InputError(
                f"{spec.family}'s layers differ or have learnt sinks; train outer layers of a "
                f"dense model whose layers all attend to everything"
            )
        if 2 * self.layers >= spec.num_layers:
            raise InputError(
                f"{self.layers} layers at either end of a model of {spec.num_layers} leave none "
                f"between; give fewer"
            )

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what is trained, what is frozen)."""
        check_float(params, purpose="training")
        outer = jax.tree.map(
            lambda x: jnp.concatenate([x[: self.layers], x[-self.layers :]]), params["layers"]
        )
        inner = jax.tree.map(lambda x: x[self.layers : -self.layers], params["layers"])
        tables = {name: params[name] for name in TABLES if name in params}
        rest = {name: x for name, x in params.items() if name not in (*TABLES, "layers")}
        return {**tables, "layers": outer}, {**rest, "layers": inner}

    def join(self, trained: Params, frozen: Params) -> Params:
        """The model's parameters."""
        layers = jax.tree.map(
            lambda outer, inner: jnp.concatenate(
                [outer[: self.layers], jnp.asarray(inner, outer.dtype), outer[self.layers :]]
            ),
            trained["layers"], frozen["layers"],
        )  # fmt: skip
        return {**frozen, **trained, "layers": layers}

    def hidden(self, trained: Params, frozen: Params, tokens: Tokens) -> Hidden:
        """Final hidden states of rows of tokens that begin at position 0."""
        spec, params = self.spec, {**frozen, **trained}
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, tokens.shape)
        config = decoder.score_configs(spec)[0]
        over_all = attend.prefill(FULL, config, positions)

        def layer(x, layer_params):
            out: Any = Block(spec).apply(
                {"params": layer_params}, x, lambda q, k, v: (over_all(q, k, v), None)
            )
            return out[0], None

        x = decoder.embed_tokens(spec, params, tokens)
        x = decoder.place_embeds(spec, params, x, positions)
        outer, inner = trained["layers"], frozen["layers"]
        first, last = (
            jax.tree.map(lambda leaf, part=part: leaf[part], outer)
            for part in (slice(self.layers), slice(self.layers, None))
        )
        for stack in (first, inner, last):
            x, _ = jax.lax.scan(layer, x, stack)
        norm: Any = Norm(spec.norm, spec.width).apply
        return norm({"params": params["final_norm"]}, x)

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        hidden = self.hidden(params, frozen, batch["tokens"])
        return mean_nll(heads.lm(self.spec, {**frozen, **params}, hidden), batch["targets"])


def mean_nll(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, ""]:
    """Nats of a target."""
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).mean()
