"""Extensible Tokenization: a context as few embeddings, which a frozen model reads as its tokens'.

    o_1 … o_n   hidden states of a copy of the model's first layers over a chunk of n tokens
    et_j        o_{k j}: the last state of every k tokens, and of a shorter rest
    the model   reads [et of earlier chunks ; embeddings of the current tokens], one after another

The layers are trained, with the ratio k drawn for each step; the model and its embeddings are not.
k is chosen when a context is read. Source: Shao et al. 2024, arXiv:2401.07793.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.attention import policy as policies
from lminf.errors import InputError
from lminf.models import decoder, heads, layer_policies
from lminf.models.quantization import check_float
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.types import Params, Tokens


def first_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """The spec of a model of the first `count` layers, with the embedding for its head."""
    if not 1 <= count <= spec.num_layers or spec.moe is not None:
        kind = "a mixture of experts" if spec.moe else f"a model of {spec.num_layers} layers"
        raise InputError(
            f"the first {count} layers of {kind}; give 1 to {spec.num_layers} layers of a model "
            f"whose layers are alike"
        )
    return dataclasses.replace(
        spec, num_layers=count, windows=spec.windows[:count],
        layer_encodings=spec.layer_encodings[:count], tied=True, head_bias=False,
    )  # fmt: skip


def first_layer_params(params: Params, count: int) -> dict[str, Any]:
    """The parameters of the model of the first `count` layers, which are those of the model."""
    kept = {name: x for name, x in params.items() if name not in ("head", "head_bias")}
    return kept | {"layers": jax.tree.map(lambda x: x[:count], params["layers"])}


def module_of(spec: ModelSpec) -> decoder.Decoder:
    """The decoder that attends as it was trained."""
    by_layer = layer_policies.by_layer(
        policies.FULL, windows=spec.windows, num_kv_heads=spec.num_kv_heads
    )
    return decoder.Decoder(spec, by_layer)


def token_nll(
    spec: ModelSpec, params: Params, hidden: Float[Array, "*B T D"], targets: Int[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """-log p(target) after each hidden state, nats."""
    log_probs = jax.nn.log_softmax(heads.lm(spec, params, hidden), axis=-1)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


@dataclass(frozen=True)
class ExtensibleTokenizer:
    """Compresses tokens into embeddings for a frozen model of this spec."""

    spec: ModelSpec
    layers: Annotated[int, Range(min=1, max=2**12)]  # of the model, copied
    chunk: Annotated[int, Range(min=2, max=2**31 - 1)]  # tokens that they read at once

    def __post_init__(self):
        ranges.check(self)
        first_layers(self.spec, self.layers)

    @cached_property
    def encoder(self) -> decoder.Decoder:
        """The copied layers."""
        return module_of(first_layers(self.spec, self.layers))

    @cached_property
    def model(self) -> decoder.Decoder:
        """The frozen model."""
        return module_of(self.spec)

    def init(self, frozen: Params) -> Params:
        """The trainable parameters: the model's first layers, and a norm that gives their states
        the scale of its embeddings.
        """
        check_float(frozen, purpose="training")
        layers = first_layer_params(frozen, self.layers)
        size = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(frozen["embed"], jnp.float32))))
        scale = size * self.spec.embed_scale - self.spec.norm.scale_offset
        norm = {name: jnp.zeros_like(x) for name, x in layers["final_norm"].items()}
        norm["scale"] = jnp.zeros_like(norm["scale"]) + scale.astype(norm["scale"].dtype)
        trained = {"layers": layers["layers"], "final_norm": norm}
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)

    def kept_positions(self, tokens: int, ratio: int) -> Int[np.ndarray, " M"]:
        """Positions, in a text of so many tokens, whose hidden states become embeddings."""
        if not 2 <= ratio <= self.chunk:
            raise InputError(
                f"a ratio of {ratio} tokens to an embedding, in chunks of {self.chunk}; give 2 to "
                f"{self.chunk}"
            )
        ends = [
            np.minimum(np.arange(start + ratio, stop + ratio, ratio), stop) - 1
            for start in range(0, tokens, self.chunk)
            for stop in [min(start + self.chunk, tokens)]
        ]
        return np.concatenate([np.zeros(0, np.int64), *ends])

    def encode(
        self, params: Params, frozen: Params, tokens: Tokens, ratio: int
    ) -> Float[Array, "B M D"]:
        """Embeddings of the tokens, chunk by chunk; M is the length of `kept_positions`."""
        rows, count = tokens.shape
        kept = self.kept_positions(count, ratio)
        padded = jnp.pad(
            tokens, ((0, 0), (0, -count % self.chunk))
        )  # nothing sees what comes later
        chunks = padded.reshape(-1, self.chunk)
        positions = jnp.broadcast_to(jnp.arange(self.chunk, dtype=jnp.int32), chunks.shape)
        encoder_params = first_layer_params(frozen, self.layers) | dict(params)
        states: Any = self.encoder.apply({"params": encoder_params}, chunks, positions=positions)
        return states[0].reshape(rows, -1, self.spec.width)[:, kept]

    def read(
        self, frozen: Params, past: Float[Array, "B M D"], tokens: Tokens
    ) -> Float[Array, "B M+T D"]:
        """Hidden states of the frozen model at the embeddings and the tokens after them."""
        embeds = jnp.concatenate([past, decoder.embed_tokens(self.spec, frozen, tokens)], 1)
        positions = jnp.arange(embeds.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, embeds.shape[:2])
        states: Any = self.model.apply({"params": frozen}, embeds=embeds, positions=positions)
        return states[0]

    def nll(
        self, params: Params, frozen: Params, tokens: Tokens, ratio: int
    ) -> Float[Array, "B _"]:
        """Nats of every token after the first chunk, T whole chunks of C tokens: each chunk's after
        the embeddings of all chunks before it and its own tokens (two streams: all embeddings are
        made first, and then all chunks are read side by side).
        """
        rows, total = tokens.shape
        size, later = self.chunk, total // self.chunk - 1
        if later < 1 or total % size:
            raise InputError(
                f"rows of {total} tokens for chunks of {size}; give two whole chunks or more"
            )
        past = self.encode(params, frozen, tokens[:, :-size], ratio)
        width = past.shape[1]
        # Rows end together: what a chunk has no embeddings for stands below position 0.
        padding = jnp.arange(later - 1, -1, -1, dtype=jnp.int32)[:, None] * (width // later)
        source = jnp.maximum(jnp.arange(width, dtype=jnp.int32)[None] - padding, 0)
        raw = decoder.embed_tokens(self.spec, frozen, tokens[:, size:])
        raw = raw.reshape(rows, later, size, -1)[:, :, :-1]
        embeds = jnp.concatenate([past[:, source], raw], 2)
        positions = jnp.arange(embeds.shape[2], dtype=jnp.int32)[None] - padding
        positions = jnp.broadcast_to(positions, embeds.shape[:3])
        embeds, positions = (x.reshape(-1, *x.shape[2:]) for x in (embeds, positions))
        states: Any = self.model.apply({"params": frozen}, embeds=embeds, positions=positions)
        hidden = states[0][:, width - 1 :].reshape(rows, later * size, -1)
        return token_nll(self.spec, frozen, hidden, tokens[:, size:])


@dataclass(frozen=True)
class TwoStream:
    """The loss of lminf.train.frozen that trains an ExtensibleTokenizer: mean nats of the tokens
    after the first chunk, by the batch's `weights` if it has some.
    """

    tokenizer: ExtensibleTokenizer
    ratio: int

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        nll = self.tokenizer.nll(params, frozen, batch["tokens"], self.ratio)
        weights = batch.get("weights", jnp.ones(batch["tokens"].shape))[:, self.tokenizer.chunk :]
        return (weights * nll).sum() / jnp.maximum(weights.sum(), 1.0)
