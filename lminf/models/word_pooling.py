"""Word pooling: a model reads words as a few vectors each, and writes them unit by unit.

    encoder    inside each word, in both directions: [slots ; units] -> the p vectors of the slots
    backbone   any decoder over the p vectors of every word; the slots of a word see one another and
               all earlier words
    decoder    for every next word at once, causal: [p states of the backbone ; units of the word]
               -> its units, and the unit that ends it

A unit is a byte, a character or a subword. Where a row has W words of at most c units, attention
costs W (p + c)^2 inside words and (W p)^2 in the backbone, against (W c)^2 over all units.
Source: Thawani et al. 2023, arXiv:2310.11628.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.attention import attend, reference, scores
from lminf.attention.policy import FULL, LayerPolicy
from lminf.errors import InputError
from lminf.models import decoder, heads, layer_policies
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.types import Hidden, Params

Count: TypeAlias = Annotated[int, Range(min=1, max=2**12)]
# Words, each at most c units (0 or more) and then -1.
Words: TypeAlias = Int[Array, "B W c"]
Vectors: TypeAlias = Float[Array, "B W p D"]


def prefill(
    policy: LayerPolicy, config: scores.ScoreConfig, positions: Int[Array, "B T"], **options: Any
) -> attend.Prefill:
    """Attention over vectors of which several have one position and see one another.

    One dense softmax, in memory O(T^2): the kernels take positions to rise by one. `options`, which
    are segments and how to run a kernel, must be None.
    """
    if any(value is not None for value in options.values()):
        given = next(name for name, value in options.items() if value is not None)
        raise InputError(f"word pooling reads one text a row on one device; leave {given} out")
    placement = scores.Placement(config, positions)
    return scores.by_head(
        policy, config,
        lambda part: reference.dense(part, config, placement, positions, positions),
    )  # fmt: skip


@dataclass(frozen=True)
class WordPooling:
    """The model around a backbone of this spec, whose vocabulary are the units."""

    spec: ModelSpec
    slots: Count  # p, vectors of a word
    encoder_layers: Count
    decoder_layers: Count
    stop: Annotated[int, Range(min=0, max=2**31 - 1)]  # the unit that ends a word

    def __post_init__(self):
        ranges.check(self)
        if self.stop >= self.spec.vocab_size:
            raise InputError(
                f"stop={self.stop} of a vocabulary of {self.spec.vocab_size} units; give one of "
                f"them, which no word has"
            )
        if self.spec.moe is not None or self.spec.sinks:
            raise InputError(
                f"the backbone is {self.spec.family} with experts or learnt sinks, and word "
                f"pooling has neither; give a dense model without sinks"
            )

    @cached_property
    def modules(self) -> dict[str, decoder.Decoder]:
        """The encoder, the backbone, whose windows, if the spec has some, are in words, and the
        decoder.
        """
        by_layer = layer_policies.by_layer(
            FULL, windows=self.spec.windows, num_kv_heads=self.spec.num_kv_heads
        )
        return {
            "encoder": self._inside_words(self.encoder_layers),
            "backbone": decoder.Decoder(self.spec, by_layer, prefill=prefill),
            "decoder": self._inside_words(self.decoder_layers),
        }

    def _inside_words(self, layers: int) -> decoder.Decoder:
        spec = dataclasses.replace(
            self.spec, num_layers=layers, windows=(None,) * layers, layer_encodings=(), tied=True,
            head_bias=False,
        )  # fmt: skip
        return decoder.Decoder(spec, (FULL,) * layers)

    def init(self, *, key: jax.Array) -> Params:
        """Fresh float32 parameters. Units have one embedding, that of the backbone, and the decoder
        reads its logits off the backbone's head.
        """
        slots_key, *keys = jax.random.split(key, 4)
        params: dict[str, Any] = {
            part: decoder.init(module.spec, key=part_key)
            for (part, module), part_key in zip(self.modules.items(), keys, strict=True)
        }
        for part in ("encoder", "decoder"):
            params[part] = {name: x for name, x in params[part].items() if name != "embed"}
        shape, std = (self.slots, self.spec.width), self.spec.width**-0.5 * self.spec.embed_scale
        return params | {"slots": jax.random.normal(slots_key, shape) * std}

    # --- The three parts --------------------------------------------------------------------------

    def encode(self, params: Params, words: Words) -> Vectors:
        """The p vectors of every word, which depend on its units alone."""
        units = words.reshape(-1, words.shape[-1])
        slots = jnp.broadcast_to(params["slots"][None], (len(units), self.slots, self.spec.width))
        embeds = jnp.concatenate([slots, self._embed(params, units)], 1)
        present = jnp.pad(units >= 0, ((0, 0), (self.slots, 0)), constant_values=True)
        places = jnp.arange(embeds.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where(present, places, -1)
        hidden = self._apply("encoder", params, embeds, positions, bidirectional=True)
        return hidden[:, : self.slots].reshape(*words.shape[:2], self.slots, -1)

    def read(self, params: Params, vectors: Vectors) -> Vectors:
        """States of the backbone at every slot, from which the next word is written."""
        batch, words, slots, width = vectors.shape
        positions = jnp.repeat(jnp.arange(words, dtype=jnp.int32), slots)[None]
        positions = jnp.broadcast_to(positions, (batch, words * slots))
        embeds = vectors.reshape(batch, words * slots, width)
        return self._apply("backbone", params, embeds, positions).reshape(vectors.shape)

    def logits(self, params: Params, states: Vectors, words: Words) -> Float[Array, "B W c+1 V"]:
        """Of the units of the word after each state, and of what follows its last: the unit that
        ends it. Each is read off the units before it.
        """
        units = words.reshape(-1, words.shape[-1])
        prefix = states.reshape(-1, *states.shape[2:])
        embeds = jnp.concatenate([prefix, self._embed(params, units)], 1)
        # Padding comes last, where nothing of the word sees it.
        positions = jnp.arange(embeds.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, embeds.shape[:2])
        hidden = self._apply("decoder", params, embeds, positions)[:, states.shape[2] - 1 :]
        logits = heads.lm(self.spec, params["backbone"], hidden)
        return logits.reshape(*words.shape[:2], *logits.shape[1:])

    def _embed(self, params: Params, units: Int[Array, "R c"]) -> Hidden:
        return decoder.embed_tokens(self.spec, params["backbone"], jnp.maximum(units, 0))

    def _apply(
        self, part: str, params: Params, embeds: Hidden, positions: Int[Array, "R T"], **options
    ) -> Hidden:
        own = {"embed": params["backbone"]["embed"], **params[part]}
        states: Any = self.modules[part].apply(
            {"params": own}, embeds=embeds, positions=positions, **options
        )
        return states[0]

    # --- Words ------------------------------------------------------------------------------------

    def targets(self, words: Words) -> Int[Array, "B W c+1"]:
        """The units of each word, the unit that ends it, and then -1."""
        longer = jnp.pad(words, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        places = jnp.arange(longer.shape[-1], dtype=jnp.int32)[None, None]
        ends = places == (longer >= 0).sum(-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(ends, self.stop, longer)

    def next_words(
        self, params: Params, words: Words
    ) -> tuple[Float[Array, "B W-1 c+1 V"], Int[Array, "B W-1 c+1"]]:
        """(logits, targets) of every word after the first of a row."""
        states = self.read(params, self.encode(params, words[:, :-1]))
        return self.logits(params, states, words[:, 1:]), self.targets(words[:, 1:])

    @partial(jax.jit, static_argnums=0)
    def generate(self, params: Params, words: Words) -> Int[Array, "B c"]:
        """The likeliest unit after the other of the word that comes after each row."""
        state = self.read(params, self.encode(params, words))[:, -1:]

        def step(place, written):
            units, ended = written
            unit = self.logits(params, state, units[:, None])[:, 0, place].argmax(-1)
            unit = unit.astype(units.dtype)
            ended = ended | (unit == self.stop)
            return units.at[:, place].set(jnp.where(ended, -1, unit)), ended

        empty = jnp.full_like(words[:, 0], -1), jnp.zeros(len(words), bool)
        return jax.lax.fori_loop(0, words.shape[-1], step, empty)[0]


@dataclass(frozen=True)
class NextWords:
    """The loss of lminf.train.frozen that trains a WordPooling, without a frozen model: nats per
    unit of the words of a batch, ends included.
    """

    pooling: WordPooling

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        logits, targets = self.pooling.next_words(params, batch["words"])
        chosen = jnp.maximum(targets, 0)[..., None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]
        return jnp.where(targets >= 0, nll, 0).sum() / (targets >= 0).sum(dtype=jnp.float32)
