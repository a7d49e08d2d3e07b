"""LongMem: a frozen model whose keys and values of earlier segments a small side network reads.

    H_0 … H_L   hidden states of the frozen model over a segment, H_0 its embeddings
    x_{l+1}     = side layer l (x_l) + H_{2l+2} − H_{2l},  x_0 = H_0; its head is the model's
    memory      in the side layer of one model layer m: (1 − σ(β)) · local + σ(β) · softmax(q·k s) v
                over the retrieved of the keys and values that layer m had in earlier segments

Side layer l starts as the model's layer 2l + 1, β (of each head) as 0. A query retrieves the chunks
whose mean key has the largest inner product with it. Memory has no positions: neither its keys nor
the queries that look there are rotated. Rows have memories of their own, where the released code
searches those of all rows. Source: Wang et al. 2023, arXiv:2306.07174.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf import ranges
from lminf.attention import attend
from lminf.attention.scores import MASKED
from lminf.errors import InputError
from lminf.models import decoder
from lminf.models.extensible import module_of, token_nll
from lminf.models.layers import Block, Norm
from lminf.models.quantization import check_float
from lminf.models.spec import ModelSpec
from lminf.ranges import Range
from lminf.types import Hidden, Params, Tokens

Count: TypeAlias = Annotated[int, Range(min=1, max=2**31 - 1)]


class Bank(NamedTuple):
    """Keys, un-rotated, and values of the last tokens, the newest at the end; the first slots are
    empty until it is full.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    filled: Int[Array, ""]  # slots

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "Bank":
        """With these at the end; the oldest go where there is no room."""
        slots = self.k.shape[1]
        keys, values = (
            jnp.concatenate([old, new.astype(old.dtype)], 1)[:, -slots:]
            for old, new in ((self.k, k), (self.v, v))
        )
        return Bank(keys, values, jnp.minimum(self.filled + k.shape[1], slots).astype(jnp.int32))


def memory_attention(
    q: Float[Array, "B T N H"], bank: Bank, *, chunk: int, retrieved: int, scale: float
) -> Float[Array, "B T N H"]:
    """Of each query over the `retrieved` tokens of the bank in the chunks of the largest inner
    products with it; exact, without an index. Undefined for an empty bank.
    """
    batch, tokens, num_heads, width = q.shape
    slots, kv_heads = bank.k.shape[1:3]
    q = q.reshape(batch, tokens, kv_heads, num_heads // kv_heads, width)
    # [B, K, M, c, H]
    k, v = (
        x.reshape(batch, slots // chunk, chunk, kv_heads, width).transpose(0, 3, 1, 2, 4)
        for x in (bank.k, bank.v)
    )
    first = (slots - bank.filled) // chunk
    scores = jnp.einsum("btkgh,bkmh->bkgtm", q, k.mean(3))
    filled = jnp.arange(slots // chunk, dtype=jnp.int32) >= first
    filled = jnp.broadcast_to(filled, scores.shape)
    _, chosen = jax.lax.top_k(jnp.where(filled, scores, -jnp.inf), retrieved // chunk)
    row, head = (
        jnp.arange(size, dtype=jnp.int32).reshape(shape)
        for size, shape in ((batch, (-1, 1, 1, 1, 1)), (kv_heads, (1, -1, 1, 1, 1)))
    )
    keys, values = k[row, head, chosen], v[row, head, chosen]  # [B, K, G, T, m, c, H]
    scores = scale * jnp.einsum("btkgh,bkgtmch->bkgtmc", q, keys)
    scores = jnp.where((chosen >= first)[..., None], scores, MASKED)
    weights = jax.nn.softmax(scores.reshape(*scores.shape[:4], -1), axis=-1)
    out = jnp.einsum("bkgtmc,bkgtmch->btkgh", weights.reshape(scores.shape), values)
    return out.reshape(batch, tokens, num_heads, width)


@dataclass(frozen=True)
class LongMem:
    """A side network of a model of this spec; its memory is of the tokens of earlier segments."""

    spec: ModelSpec
    memory_layer: Annotated[int, Range(min=1, max=2**12)]  # of the model, counted from 0
    capacity: Count  # tokens of the bank
    retrieved: Count = 64  # tokens of it that a query attends to
    chunk: Count = 4  # tokens that are retrieved together

    def __post_init__(self):
        ranges.check(self)
        spec = self.spec
        if spec.moe is not None or spec.sinks or spec.num_layers % 2:
            raise InputError(
                f"a side network has a layer for every two of the model, which are alike and "
                f"without learnt sinks; {spec.family} with {spec.num_layers} layers has none"
            )
        if self.memory_layer % 2 == 0 or self.memory_layer >= spec.num_layers:
            raise InputError(
                f"memory_layer={self.memory_layer} of a model of {spec.num_layers} layers; give an "
                f"odd number below, that of a layer which a side layer starts as"
            )
        if self.retrieved % self.chunk or self.capacity % self.chunk:
            raise InputError(
                f"retrieved={self.retrieved} and capacity={self.capacity} in chunks of "
                f"{self.chunk}; give multiples of the chunk"
            )
        if self.retrieved > self.capacity:
            raise InputError(
                f"retrieved={self.retrieved} of capacity={self.capacity} tokens; give at most all"
            )

    @cached_property
    def model(self) -> decoder.Decoder:
        """The frozen model."""
        return module_of(self.spec)

    def init(self, frozen: Params) -> Params:
        """The trainable parameters: every second layer of the model, and β [N]."""
        check_float(frozen, purpose="training")
        layers = jax.tree.map(lambda x: jnp.array(x[1::2], jnp.float32), frozen["layers"])
        return {"layers": layers, "beta": jnp.zeros(self.spec.num_heads)}

    def empty(self, rows: int) -> Bank:
        """An empty bank for each row."""
        shape = (rows, self.capacity, self.spec.num_kv_heads, self.spec.head_dim)
        return Bank(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((), jnp.int32))

    def read(self, side: Params, frozen: Params, bank: Bank, tokens: Tokens) -> tuple[Hidden, Bank]:
        """Hidden states of a segment, for the model's head, and the bank with the segment in it,
        which it did not see itself.
        """
        if tokens.shape[1] % self.chunk:
            raise InputError(
                f"a segment of {tokens.shape[1]} tokens in chunks of {self.chunk}; give a multiple"
            )
        spec = self.spec
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, tokens.shape)
        applied: Any = self.model.apply(
            {"params": frozen}, tokens, positions=positions, mutable=["intermediates"]
        )
        inside = applied[1]["intermediates"]["layers"]
        x = decoder.embed_tokens(spec, frozen, tokens)
        x = decoder.place_embeds(spec, frozen, x, positions)
        states = jnp.concatenate([x[None], inside["hidden"][0]])
        for layer in range(spec.num_layers // 2):
            params = jax.tree.map(lambda w, layer=layer: w[layer], side["layers"])
            attending = self._attend(2 * layer + 1, positions, bank, side["beta"])
            out: Any = Block(spec).apply({"params": params}, x, attending)
            x = out[0] + states[2 * layer + 2] - states[2 * layer]
        hidden: Any = Norm(spec.norm, spec.width).apply({"params": frozen["final_norm"]}, x)
        k, v = (inside["attention"][name][0][self.memory_layer] for name in "kv")
        return hidden, bank.append(k, v)

    def _attend(self, model_layer: int, positions: Int[Array, "B T"], bank: Bank, beta: Array):
        """How the side layer that starts as this layer of the model attends."""
        config = decoder.score_configs(self.spec)[model_layer]
        local = attend.prefill(self.model.policies[model_layer], config, positions)
        if model_layer != self.memory_layer:
            return lambda q, k, v: (local(q, k, v), None)

        def fused(q, k, v):
            near = local(q, k, v)
            far = memory_attention(
                q, bank, chunk=self.chunk, retrieved=self.retrieved, scale=config.scale
            )
            gate = jax.nn.sigmoid(beta)[None, None, :, None]
            return jnp.where(bank.filled > 0, (1 - gate) * near + gate * far, near), None

        return fused

    def nll(
        self, side: Params, frozen: Params, tokens: Tokens, segment: int, *, remember: bool = True
    ) -> Float[Array, "B T-1"]:
        """Nats of every token after the first, segment by segment; without the bank where it is
        not to `remember`.
        """
        rows, total = tokens.shape
        if total % segment:
            raise InputError(f"rows of {total} tokens in segments of {segment}; give a multiple")

        def step(bank, tokens):
            hidden, longer = self.read(side, frozen, bank, tokens)
            return longer if remember else bank, hidden

        segments = tokens.reshape(rows, -1, segment).swapaxes(0, 1)
        _, hidden = jax.lax.scan(step, self.empty(rows), segments)
        hidden = hidden.swapaxes(0, 1).reshape(rows, total, -1)[:, :-1]
        return token_nll(self.spec, frozen, hidden, tokens[:, 1:])


@dataclass(frozen=True)
class SideNetwork:
    """The loss of lminf.train.frozen that trains a LongMem: mean nats of the tokens after the
    first, by the batch's `weights` if it has some.
    """

    longmem: LongMem
    segment: int

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        nll = self.longmem.nll(params, frozen, batch["tokens"], self.segment)
        weights = batch.get("weights", jnp.ones(batch["tokens"].shape))[:, 1:]
        return (weights * nll).sum() / jnp.maximum(weights.sum(), 1.0)
