"""Llama and the families that differ from it in one thing or two."""

from typing import Any

from lminf.attention import rope
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import Fields
from lminf.checkpoints.families.family import (
    ATTENTION,
    ENDS,
    JOINED_MLP,
    LLAMA,
    MLP,
    PRE_NORMS,
    Family,
    by_type,
    differing,
    divided,
    every,
    layer_norm,
    layer_norms,
    llama_fields,
    llama_like,
    share_rotated,
    type_encodings,
    window_fields,
)
from lminf.checkpoints.weight_maps import row
from lminf.errors import InputError
from lminf.models.spec import ModelSpec


def _llama(fields: Fields, family: str) -> ModelSpec:
    fields.only("rope_interleaved", False)
    return llama_like(fields, family)


def _llama_fields(spec: ModelSpec) -> dict[str, Any]:
    return llama_fields(spec) | {"mlp_bias": spec.mlp.bias}


def _mistral(fields: Fields, family: str, **spec_fields: Any) -> ModelSpec:
    window, layers = fields.stated("sliding_window"), fields["num_hidden_layers"]
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    windows = by_type(fields, window) or (window,) * layers
    return llama_like(fields, family, windows=windows, **spec_fields)


def _mistral_fields(spec: ModelSpec) -> dict[str, Any]:
    return llama_fields(spec) | {"sliding_window": spec.windows[0]}


def _ministral_fields(spec: ModelSpec) -> dict[str, Any]:
    return llama_fields(spec) | window_fields(spec)


def _ministral3(fields: Fields, family: str) -> ModelSpec:
    return _mistral(fields, family, query_gain=hf_rotary.query_gain(fields))


def _ministral3_fields(spec: ModelSpec) -> dict[str, Any]:
    values = _mistral_fields(spec)
    for name in ("rope_theta", "rope_scaling"):
        values.pop(name, None)
    assert isinstance(spec.encoding, rope.Rotary)
    return values | hf_rotary.write_with_gain(spec.encoding, spec.query_gain)


def _granite(fields: Fields, family: str) -> ModelSpec:
    multipliers = ("residual", "embedding", "attention")
    residual, embedding, attention = (fields.get(f"{name}_multiplier", 1) for name in multipliers)
    return llama_like(
        fields,
        family,
        residual_scale=float(residual),
        embed_scale=float(embedding),
        query_scale=float(attention),
        logit_scale=1 / fields.get("logits_scaling", 1),
    )


def _granite_fields(spec: ModelSpec) -> dict[str, Any]:
    return _llama_fields(spec) | {
        "residual_multiplier": spec.residual_scale,
        "embedding_multiplier": spec.embed_scale,
        "attention_multiplier": spec.query_scale,
        "logits_scaling": 1 / spec.logit_scale,
    }


# --- Qwen -----------------------------------------------------------------------------------------


def qwen(fields: Fields, family: str, **spec_fields: Any) -> ModelSpec:
    """Spec of a Qwen 2 or 3, whose layers slide from the max_window_layers-th on."""
    layers = fields["num_hidden_layers"]
    slides = fields.get("use_sliding_window", False)
    window = fields["sliding_window"] if slides else fields.ignored("sliding_window")
    first = fields["max_window_layers"] if slides else fields.ignored("max_window_layers", layers)
    windows = tuple(window if layer >= first else None for layer in range(layers))
    fields.only("mlp_bias", False)
    extra: dict[str, Any] = {"windows": by_type(fields, window) or windows}
    if family == "qwen2":
        fields.only("attention_bias", True)
        extra |= {"qkv_bias": True, "out_bias": False}
    else:
        fields["head_dim"]  # the default of its absence is one model's
        extra |= {"qk_norm": "head"}
    return llama_like(fields, family, **(extra | spec_fields))


def qwen_fields(spec: ModelSpec) -> dict[str, Any]:
    """What `qwen` reads."""
    windows = window_fields(spec)
    window, types = windows["sliding_window"], windows["layer_types"]
    # transformers wants the number of the first layer that slides, whatever the types say.
    first = types.index("sliding_attention") if window else spec.num_layers
    extra = {"use_sliding_window": window is not None, "max_window_layers": first}
    values = llama_fields(spec) | windows | extra
    if spec.family == "qwen2":
        del values["attention_bias"]  # it has no such field: queries, keys and values have biases
    return values


# --- Norms and layers that differ -----------------------------------------------------------------


def _olmo2(fields: Fields, family: str) -> ModelSpec:
    return llama_like(
        fields, family, rotary={"base": None}, qk_norm="all", pre_norms=False, post_norms=True
    )


def _olmo3(fields: Fields, family: str) -> ModelSpec:
    window, layers = fields["sliding_window"], fields["num_hidden_layers"]
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    full, sliding = hf_rotary.read_by_type(fields, fields.get("head_dim") or width // heads)
    windows = by_type(fields, window) or every(layers, 4, window)
    encodings = tuple(full if width is None else sliding for width in windows)
    return llama_like(
        fields,
        family,
        encoding=full,
        layer_encodings=differing(full, encodings),
        windows=windows,
        qk_norm="all",
        pre_norms=False,
        post_norms=True,
    )


def _olmo3_fields(spec: ModelSpec) -> dict[str, Any]:
    rotary = hf_rotary.write_by_type(*type_encodings(spec))
    del rotary["rope_local_base_freq"]
    return llama_fields(spec) | window_fields(spec) | rotary


def _smollm3(fields: Fields, family: str) -> ModelSpec:
    layers = fields["num_hidden_layers"]
    rotates = fields["no_rope_layers"]  # 1: the layer rotates, whatever the name says
    fields.ignored("no_rope_layer_interval")  # from which the list was made
    if len(rotates) != layers or set(rotates) - {0, 1}:
        raise InputError(
            f"{fields.source} has no_rope_layers = {str(rotates)[:60]} for {layers} layers; give a "
            f"1 (rotary) or 0 (no encoding) for each"
        )
    fields.ignored("max_window_layers")  # Qwen 2's, without effect here
    slides = fields.get("use_sliding_window", False)
    window = fields["sliding_window"] if slides else fields.ignored("sliding_window")
    windows = by_type(fields, window)
    if windows is None:
        windows = tuple(None if rotary else window for rotary in rotates)
    encodings = tuple(None if rotary else rope.NoEncoding() for rotary in rotates)
    return llama_like(
        fields,
        family,
        rotary={"base": None},
        windows=windows,
        layer_encodings=encodings if 0 in rotates else (),
        tied=fields.get("tie_word_embeddings", True),
    )


def _smollm3_fields(spec: ModelSpec) -> dict[str, Any]:
    rotates = [int(isinstance(encoding, rope.Rotary)) for encoding in spec.encodings]
    windows = window_fields(spec)
    slides = windows["sliding_window"] is not None
    return _llama_fields(spec) | windows | {"no_rope_layers": rotates, "use_sliding_window": slides}


def _phi3(fields: Fields, family: str) -> ModelSpec:
    window = fields.stated("sliding_window")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    return llama_like(fields, family, windows=(window,) * fields["num_hidden_layers"])


def _phi3_fields(spec: ModelSpec) -> dict[str, Any]:
    # transformers fills in a length of its own where this one is absent.
    values = {"original_max_position_embeddings": spec.trained_length} | llama_fields(spec)
    del values["attention_bias"]
    share = {"partial_rotary_factor": share_rotated(spec)}
    return values | {"sliding_window": spec.windows[0]} | share


def _glm(fields: Fields, family: str) -> ModelSpec:
    fields["head_dim"]
    bias = fields.get("attention_bias", True)
    return llama_like(
        fields,
        family,
        rotary={"layout": "interleaved", "share": 0.5},
        qkv_bias=bias,
        out_bias=False,
        post_norms=family == "glm4",
    )


def _glm_fields(spec: ModelSpec) -> dict[str, Any]:
    return llama_fields(spec) | {"partial_rotary_factor": share_rotated(spec)}


def _stablelm(fields: Fields, family: str) -> ModelSpec:
    head_dim = divided(fields, fields["hidden_size"], fields["num_attention_heads"])
    fields.same("head_dim", head_dim)
    fields.only("rotary_scaling_factor", 1.0)
    return llama_like(
        fields,
        family,
        head_dim=head_dim,
        rotary={"share": 0.25},
        norm=layer_norm(fields, "layer_norm_eps", bias=True),
        qkv_bias=fields.get("use_qkv_bias", False),
        out_bias=False,
        qk_norm="each_head" if fields.get("qk_layernorm", False) else None,
        residual="parallel_shared" if fields.get("use_parallel_residual", False) else "sequential",
    )


def _stablelm_fields(spec: ModelSpec) -> dict[str, Any]:
    values = llama_fields(spec)
    for name in ("rms_norm_eps", "attention_bias"):
        del values[name]
    return values | {
        "layer_norm_eps": spec.norm.epsilon,
        "use_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm == "each_head",
        "use_parallel_residual": spec.residual == "parallel_shared",
        "partial_rotary_factor": share_rotated(spec),
    }


def _cohere(fields: Fields, family: str) -> ModelSpec:
    extra: dict[str, Any] = {}
    if family == "cohere2":
        # Layers with a window are rotated, the others carry no positions.
        window, layers = fields["sliding_window"], fields["num_hidden_layers"]
        pattern = fields.get("sliding_window_pattern", 4)
        fields.same("_sliding_window_pattern", pattern)  # as transformers 5 writes it
        fields.same("layer_switch", pattern)
        fields.only("order_of_interleaved_layers", "local_attn_first")
        fields.only("position_embedding_type", "rope_gptj")
        fields.only("rotary_pct", 1.0)
        fields.only("use_parallel_embedding", False)
        for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
            fields.only(name, True)
        windows = by_type(fields, window) or every(layers, pattern, window)
        encodings = tuple(rope.NoEncoding() if w is None else None for w in windows)
        extra = {"windows": windows, "layer_encodings": encodings if None in windows else ()}
    elif fields.get("use_qk_norm", False):
        extra = {"qk_norm": "each_head"}
    return llama_like(
        fields,
        family,
        rotary={"layout": "interleaved", "base": None},
        norm=layer_norm(fields, "layer_norm_eps", bias=False),
        residual="parallel_shared",
        logit_scale=float(fields.stated("logit_scale") or 1),
        tied=fields.get("tie_word_embeddings", True),
        **extra,
    )


def _cohere_fields(spec: ModelSpec) -> dict[str, Any]:
    values = llama_fields(spec)
    del values["rms_norm_eps"]
    extra = {"use_qk_norm": spec.qk_norm == "each_head"}
    if spec.family == "cohere2":
        extra = window_fields(spec)
    return values | extra | {"layer_norm_eps": spec.norm.epsilon, "logit_scale": spec.logit_scale}


# --- Weight maps ----------------------------------------------------------------------------------

_JOINED_ATTENTION = [
    row(
        "model.layers.{}.self_attn.qkv_proj.weight",
        "layers/attention/{wq,wk,wv}",
        "(n* h) d -> d n h + (k* h) d -> d k h + (k* h) d -> d k h",
    ),
    row("model.layers.{}.self_attn.o_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
]
_POST_NORMS = layer_norms(
    post_attention_layernorm="attention_post_norm", post_feedforward_layernorm="mlp_post_norm"
)
_NO_QK_NORM = [one for one in ATTENTION if "_norm" not in one.name]


def _head_norms(name: str, axes: tuple[str, str]) -> list:
    """Norms of queries and keys that differ by head."""
    return [
        row(f"model.layers.{{}}.self_attn.{letter}_{name}", place, pattern)
        for letter, pattern in zip("qk", axes, strict=True)
        for place in [f"layers/attention/{letter}_head_norms/scale"]
    ]


_OLMO = [
    *ENDS, *_NO_QK_NORM, *MLP, *_POST_NORMS,
    *_head_norms("norm.weight", ("(n h) -> n h", "(k h) -> k h")),
]  # fmt: skip
_COHERE = [*ENDS, *_NO_QK_NORM, *MLP, *PRE_NORMS, *_head_norms("norm.weight", ("n h", "k h"))]
_STABLELM = [
    *ENDS, *_NO_QK_NORM, *MLP, *PRE_NORMS,
    row("model.layers.{}.self_attn.q_layernorm.norms.{n}.weight",
        "layers/attention/q_head_norms/scale", "h"),
    row("model.layers.{}.self_attn.k_layernorm.norms.{k}.weight",
        "layers/attention/k_head_norms/scale", "h"),
]  # fmt: skip
_GLM4_NORMS = layer_norms(
    post_self_attn_layernorm="attention_post_norm", post_mlp_layernorm="mlp_post_norm"
)
_GLM = [*ENDS, *ATTENTION, *JOINED_MLP, *PRE_NORMS]

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _llama_fields, LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, _mistral_fields, LLAMA),
    "ministral": Family("MinistralForCausalLM", _mistral, _ministral_fields, LLAMA),
    "ministral3": Family("Ministral3ForCausalLM", _ministral3, _ministral3_fields, LLAMA),
    "granite": Family("GraniteForCausalLM", _granite, _granite_fields, LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", qwen, qwen_fields, LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", qwen, qwen_fields, LLAMA),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, llama_fields, _OLMO),
    "olmo3": Family("Olmo3ForCausalLM", _olmo3, _olmo3_fields, _OLMO),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, _smollm3_fields, LLAMA),
    "phi3": Family(
        "Phi3ForCausalLM", _phi3, _phi3_fields, [*ENDS, *_JOINED_ATTENTION, *JOINED_MLP, *PRE_NORMS]
    ),
    "glm": Family("GlmForCausalLM", _glm, _glm_fields, _GLM),
    "glm4": Family("Glm4ForCausalLM", _glm, _glm_fields, [*_GLM, *_GLM4_NORMS]),
    "stablelm": Family("StableLmForCausalLM", _stablelm, _stablelm_fields, _STABLELM),
    "cohere": Family("CohereForCausalLM", _cohere, _cohere_fields, _COHERE),
    "cohere2": Family("Cohere2ForCausalLM", _cohere, _cohere_fields, _COHERE),
}
