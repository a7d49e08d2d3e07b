"""Interchange interventions: a hidden state of one text put in the place of another text's.

If the model goes on as the other text would have it, that state carries what the texts differ in.
Source: Geiger et al. 2021, "Causal Abstractions of Neural Networks", arXiv:2106.02997.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lminf.errors import InputError
from lminf.models import decoder, layer_scan, layers
from lminf.types import Hidden, Params, Tokens


def interchange(
    module: decoder.Decoder,
    params: Params,
    base: Tokens,
    source: Tokens,
    positions: Int[Array, " B"],
) -> Float[Array, "S B T D"]:
    """Final hidden states of `base` for S = L + 1 layers l, at which the residual stream of row b
    has, at `positions[b]`, the state of `source`.

    The stream is taken behind l layers: behind 0 it is the embeddings, behind all L what the final
    norm reads. A position that no token has, such as -1, leaves the row as it is.
    """
    if module.spec.moe is not None or any(map(layer_scan.thresholds_of, module.policies)):
        raise InputError(
            "states are exchanged between layers that are alike; give a model without experts, "
            "under a policy without thresholds of layers"
        )
    of_base, of_source = (residual_stream(module, params, tokens) for tokens in (base, source))
    chosen = _positions(base) == positions[:, None]
    streams = jnp.where(chosen[None, ..., None], of_source, of_base)
    return jnp.stack([_read_on(module, params, x, layer) for layer, x in enumerate(streams)])


def residual_stream(
    module: decoder.Decoder, params: Params, tokens: Tokens
) -> Float[Array, "S B T D"]:
    """What the first layer reads, and what each of the L layers makes of it; S = L + 1."""
    positions = _positions(tokens)
    embeds = decoder.embed_tokens(module.spec, params, tokens, dtype=module.dtype)
    first = decoder.place_embeds(module.spec, params, embeds, positions)
    applied: Any = module.apply(
        {"params": params}, tokens, positions=positions, mutable=["intermediates"]
    )
    (after_layers,) = applied[1]["intermediates"]["layers"]["hidden"]
    return jnp.concatenate([first[None].astype(after_layers.dtype), after_layers])


def _read_on(module: decoder.Decoder, params: Params, x: Hidden, layer: int) -> Hidden:
    """Final hidden states of the stream behind so many layers."""
    spec = module.spec
    if layer < spec.num_layers:
        rest = dataclasses.replace(
            spec, num_layers=spec.num_layers - layer, windows=spec.windows[layer:],
            layer_encodings=spec.layer_encodings[layer:],
        )  # fmt: skip
        last_layers = module.clone(spec=rest, policies=module.policies[layer:])
        attentions, _ = last_layers.attentions(x.shape[1], _positions(x))
        stacked = jax.tree.map(lambda w: w[layer:], params["layers"])
        x, _, _ = last_layers.run_layers({"layers": stacked}, x, attentions)
    norm: Any = layers.Norm(spec.norm, spec.width).apply
    return norm({"params": params["final_norm"]}, x)


def _positions(x: Array) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
