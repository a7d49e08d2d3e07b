"""Λ-attention for one token at a time, over a cache of g + w slots that never grows."""

from jaxtyping import Array, Float

from kernels.common import arguments, dispatch, tuning
from kernels.common.config import Key
from kernels.decode import reference, xla
from kernels.decode.cache import RollingCache
from kernels.decode.operands import DecodeResiduals, Queries, Rules

IMPLEMENTATIONS = {
    "reference": reference.decode,
    "xla": xla.decode,
    "mosaic_tpu": dispatch.lazily("kernels.decode.mosaic_tpu", "decode"),
    "triton": dispatch.lazily("kernels.decode.triton", "decode"),
}
ORDER = {"cpu": ("xla",), "tpu": ("mosaic_tpu", "xla"), "gpu": ("triton", "xla")}


def lambda_decode(
    query: Float[Array, "B N H"],
    cache: RollingCache,
    *,
    query_global: Float[Array, "B N H"] | None = None,
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
    num_global and window_size of the cache. A row that has read nothing has output 0, LSE -inf.
    """
    batch, heads, width = arguments.shape("query", query, "B N H", (None,) * 3)
    _, key_heads, window, _ = arguments.shape(
        "cache.k_ring", cache.k_ring, "B K W H", (batch, None, None, width)
    )
    if heads % key_heads:
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} of the cache")
    if not window:
        raise ValueError("cache.k_ring has no slots; a window has at least 1")
    _, _, rows, _ = arguments.shape(
        "cache.k_global", cache.k_global, "B K R H", (batch, key_heads, None, width)
    )
    *_, value_width = arguments.shape(
        "cache.v_ring", cache.v_ring, "B K W Hv", (batch, key_heads, window, None)
    )
    arguments.shape(
        "cache.v_global", cache.v_global, "B K R Hv", (batch, key_heads, rows, value_width)
    )
    arguments.shape("cache.length", cache.length, "B", (batch,))
    if query_global is None:
        query_global = query
    arguments.shape("query_global", query_global, "B N H", (batch, heads, width))
    if sinks is not None:
        arguments.shape("sinks", sinks, "N", (heads,))
    dtype = str(query.dtype)
    key = Key("lambda_decode", dtype, heads, key_heads, width, batch, window, window, rows)
    result = dispatch.run(
        "lambda_decode", tuning.tuned(IMPLEMENTATIONS, key), ORDER, implementation,
        Rules(width**-0.5 if scale is None else scale, logits_soft_cap),
        Queries(query, query_global, sinks), cache, config,
    )  # fmt: skip
    return result if return_residuals else result.out
