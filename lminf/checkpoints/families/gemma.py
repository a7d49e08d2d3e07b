"""Gemma 1 to 3: norms whose scale is 1 + the stored one, embeddings times the root of the width."""

from typing import Any

from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.families.family import (
    ATTENTION,
    ENDS,
    LLAMA,
    MLP,
    Family,
    by_type,
    differing,
    every,
    layer_norms,
    llama_fields,
    llama_like,
    rms,
    type_encodings,
    window_fields,
)
from lminf.models.spec import ModelSpec


def _gemma_like(fields: Fields, family: str, **spec_fields: Any) -> ModelSpec:
    fields.only("mlp_bias", False)
    fields.only("use_bidirectional_attention", False)
    fields["head_dim"]
    return llama_like(
        fields,
        family,
        norm=rms(fields, scale_offset=1.0),
        embed_scale=fields["hidden_size"] ** 0.5,
        tied=fields.get("tie_word_embeddings", True),
        **spec_fields,
    )


def _gemma(fields: Fields, family: str) -> ModelSpec:
    # Older files say gelu and newer ones both; every release runs the tanh approximation.
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    return _gemma_like(fields, family, activation="gelu_tanh")


def _sandwiched(fields: Fields, family: str, **spec_fields: Any) -> ModelSpec:
    """Gemma 2 and 3: norms after attention and MLP too, soft caps, a scale of its own."""
    fields.ignored("hidden_act")  # older files have both; the model runs hidden_activation
    return _gemma_like(
        fields,
        family,
        activation=fields.activation("hidden_activation"),
        post_norms=True,
        query_scale=fields["query_pre_attn_scalar"] ** -0.5,
        **spec_fields,
    )


def _gemma2(fields: Fields, family: str) -> ModelSpec:
    window, layers = fields["sliding_window"], fields["num_hidden_layers"]
    fields.same("sliding_window_size", window)
    return _sandwiched(
        fields,
        family,
        windows=by_type(fields, window) or every(layers, 2, window),
        attention_soft_cap=fields.stated("attn_logit_softcapping"),
        final_soft_cap=fields.stated("final_logit_softcapping"),
    )


def _gemma3(fields: Fields, family: str) -> ModelSpec:
    window, layers = fields["sliding_window"], fields["num_hidden_layers"]
    pattern = fields.get("sliding_window_pattern", 6)
    fields.same("_sliding_window_pattern", pattern)  # as transformers 5 writes it
    windows = by_type(fields, window) or every(layers, pattern, window)
    full, sliding = hf_rotary.read_by_type(fields, fields["head_dim"])
    encodings = tuple(full if width is None else sliding for width in windows)
    return _sandwiched(
        fields,
        family,
        windows=windows,
        encoding=full,
        layer_encodings=differing(full, encodings),
        qk_norm="head",
        attention_soft_cap=fields.get("attn_logit_softcapping"),
        final_soft_cap=fields.get("final_logit_softcapping"),
    )


def _sandwiched_fields(spec: ModelSpec) -> dict[str, Any]:
    return llama_fields(spec) | {
        "hidden_activation": ACTIVATION_NAMES[spec.mlp.activation],
        **window_fields(spec),
        "query_pre_attn_scalar": round(spec.query_scale**-2),
        "attn_logit_softcapping": spec.attention_soft_cap,
        "final_logit_softcapping": spec.final_soft_cap,
    }


def _gemma3_fields(spec: ModelSpec) -> dict[str, Any]:
    return _sandwiched_fields(spec) | hf_rotary.write_by_type(*type_encodings(spec))


_SANDWICH = [
    *ENDS, *ATTENTION, *MLP,
    *layer_norms(
        input_layernorm="attention_norm", post_attention_layernorm="attention_post_norm",
        pre_feedforward_layernorm="mlp_norm", post_feedforward_layernorm="mlp_post_norm",
    ),
]  # fmt: skip

FAMILIES = {
    "gemma": Family("GemmaForCausalLM", _gemma, llama_fields, LLAMA),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _sandwiched_fields, _SANDWICH),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _gemma3_fields, _SANDWICH),
}
