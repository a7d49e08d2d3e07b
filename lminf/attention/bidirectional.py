"""Attention in both directions, as in an encoder: every token sees all tokens of its text.

Plain XLA operations, because the kernels are causal; on a mesh the compiler partitions them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.attention import scores
from lminf.attention.attend import Prefill
from lminf.attention.scores import Placement, ScoreConfig
from lminf.kernels.common import masks

BLOCK = 256  # queries that are scored at once


def prefill(
    config: ScoreConfig, positions: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None
) -> Prefill:
    """Attention of a text over itself, to the left and to the right.

    Positions, segments and padding are those of `attend.prefill`; ALiBi takes the distance without
    its sign. Memory: the scores of BLOCK queries, [B, N, BLOCK, T] in float32, in the backward too.
    """
    placement = Placement(config, positions, segments)
    rotation = placement.rotation(positions)
    texts = jnp.zeros_like(positions) if segments is None else segments
    texts = jnp.where(positions < 0, masks.PADDING, texts)
    batch, tokens = positions.shape
    block = min(BLOCK, tokens)

    def blocks(x, fill=0):
        """x [B, T, …] as [blocks, B, BLOCK, …]."""
        widths = [(0, 0), (0, -tokens % block), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    def attend(q, k, v) -> Float[Array, "B T N H"]:
        slopes = config.slopes(q.shape[2])
        q, k = placement.rotate(q, rotation), placement.rotate(k, rotation)

        @jax.checkpoint
        def attend_block(args):
            q, q_pos, q_texts = args
            seen = (q_texts[:, :, None] == texts[:, None]) & (q_texts != masks.PADDING)[..., None]
            distance = (q_pos[:, :, None] - positions[:, None])[:, None]
            bias = {"slopes": slopes, "distance": distance}
            return scores.attention(config, q, k, v, seen[:, None], **bias).out

        out = jax.lax.map(
            attend_block, (blocks(q), blocks(positions), blocks(texts, masks.PADDING))
        )
        return out.swapaxes(0, 1).reshape(batch, -1, *out.shape[3:])[:, :tokens]

    return config.gained(attend, positions)
