"""Λ-attention for one token at a time, over a cache of g + w slots that never grows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.kernels.common import arguments, dispatch, tuning
from lminf.kernels.common.config import Key
from lminf.kernels.common.masks import GlobalDistance
from lminf.kernels.decode import reference, xla
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals, Places, Queries, Rules

IMPLEMENTATIONS = {
    "reference": reference.decode,
    "xla": xla.decode,
    "mosaic_tpu": dispatch.lazily("lminf.kernels.decode.mosaic_tpu", "decode"),
    "triton": dispatch.lazily("lminf.kernels.decode.triton", "decode"),
}
ORDER = {"cpu": ("xla",), "tpu": ("mosaic_tpu", "xla"), "gpu": ("triton", "xla")}


def lambda_decode(
    query: Float[Array, "B N H"],
    cache: RollingCache,
    *,
    layer: int | Int[Array, ""] | None = None,
    query_global: Float[Array, "B N H"] | None = None,
    global_count: Int[Array, " B"] | Int[Array, "B K"] | None = None,
    head_window: Sequence[int] | Int[Array, " K"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    clip_distance: int | None = None,
    global_distance: GlobalDistance | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_residuals: bool = False,
    implementation: dispatch.Choice = None,
    config: object = None,
) -> Array | DecodeResiduals:
    """Attention outputs [B, N, Hv] of the last token read; with `return_residuals`, the LSE [B, N].

    The token's own key has been appended: it stands at position cache.length - 1. `query` meets
    the ring and `query_global` (None: `query`) the globals, so that both distances come from how
    the caller rotated them. The numbers are those of row length - 1 of `lambda_attention` with
    num_global and window_size of the cache. A row that sees nothing has output 0, LSE -inf.

    With `layer`, the cache is that layer's of stacked ones, which are read where they lie.
    `global_count` says how many rows of the globals there are, for each key head if it is [B, K]:
    with it, gathered tokens can stand for globals, and there may be no ring (W = 0).
    `head_window` gives each key head a window of its own, at most W. `alibi_slopes` subtracts slope
    * distance from the scaled score: of a global, min(distance, clip_distance), or what
    `global_distance` (query [B, 1], key [B, R]) says.
    """
    batch, heads, width = arguments.shape("query", query, "B N H", (None,) * 3)
    stacked, layers = ("", ()) if layer is None else ("L ", (cache.length.shape[0],))

    def shape(name: str, letters: str, *expected: int | None) -> tuple[int, ...]:
        given, expected = getattr(cache, name), (*layers, *expected)
        sizes = arguments.shape(f"cache.{name}", given, stacked + letters, expected)
        return sizes[len(layers) :]

    _, key_heads, window, _ = shape("k_ring", "B K W H", batch, None, None, width)
    if heads % key_heads:
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} of the cache")
    if not window and global_count is None:
        raise ValueError("cache.k_ring has no slots; a window has at least 1")
    _, _, rows, _ = shape("k_global", "B K R H", batch, key_heads, None, width)
    *_, value_width = shape("v_ring", "B K W Hv", batch, key_heads, window, None)
    shape("v_global", "B K R Hv", batch, key_heads, rows, value_width)
    shape("length", "B", batch)
    if query_global is None:
        query_global = query
    arguments.shape("query_global", query_global, "B N H", (batch, heads, width))
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if vector is not None:
            arguments.shape(name, vector, "N", (heads,))
    if clip_distance is not None:
        arguments.count("clip_distance", clip_distance, least=1)
    if global_count is not None:
        global_count = jnp.asarray(global_count, jnp.int32)
        if global_count.shape not in ((batch,), (batch, key_heads)):
            raise ValueError(
                f"global_count has shape {global_count.shape}; "
                f"it must be [{batch}] or [{batch}, {key_heads}]"
            )
        global_count = global_count.reshape(batch, -1)
    if head_window is not None:
        for value in [] if isinstance(head_window, jax.Array) else head_window:
            arguments.count("head_window", value, least=1)
            if value > window:
                raise ValueError(f"head_window={value} exceeds the {window} slots of the ring")
        head_window = jnp.asarray(head_window, jnp.int32)
        arguments.shape("head_window", head_window, "K", (key_heads,))
    if global_distance is not None:
        global_distance = global_distance.checked(batch, 1, rows)
    if alibi_slopes is not None:
        alibi_slopes = jax.lax.stop_gradient(alibi_slopes)
    dtype = str(query.dtype)
    key = Key("lambda_decode", dtype, heads, key_heads, width, batch, window, window, rows)
    result = dispatch.run(
        "lambda_decode", tuning.tuned(IMPLEMENTATIONS, key), ORDER, implementation,
        Rules(width**-0.5 if scale is None else scale, logits_soft_cap, clip_distance),
        Queries(query, query_global, sinks), cache,
        Places(
            None if layer is None else jnp.asarray(layer, jnp.int32), global_count, head_window,
            alibi_slopes, global_distance,
        ),
        config,
    )  # fmt: skip
    return result if return_residuals else result.out
