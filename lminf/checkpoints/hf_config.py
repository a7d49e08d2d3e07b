"""config.json <-> ModelSpec, one function per family.

Every field of a config.json is either read here, or listed as known not to change what the model
computes, or refused by name; a value that asks for mathematics we do not have is refused too. A
field that is null is as good as absent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lminf.attention import rope
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.hf_fields import ATTENTION_SHAPE, MEANINGLESS, SHAPE
from lminf.errors import InputError
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec

CLASSES = {  # what transformers calls the model
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "mpt": "MptForCausalLM",
}


def to_spec(values: Mapping[str, Any], source: str) -> ModelSpec:
    """The spec of a config.json; `source` names the file in errors."""
    if values.get("quantization_config") is not None:
        raise InputError(
            f"{source} describes quantised weights (quantization_config), which are not read from "
            f"safetensors; give the folder of the original weights, or a GGUF file of this model, "
            f"whose quantised types are read"
        )
    fields = Fields(values, source, SHAPE, MEANINGLESS)
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{source} describes a model of the type {family!r}; the types {', '.join(FAMILIES)} "
            f"are read"
        )
    try:
        spec = FAMILIES[family][0](fields, family)
    except InputError as error:  # of a value that is allowed by itself but not beside the others
        if str(error).startswith(source):
            raise
        raise InputError(f"{source} describes no model that can be: {error}") from error
    fields.refuse_others()
    return spec


def from_spec(spec: ModelSpec) -> dict[str, Any]:
    """A config.json, as transformers reads it, that describes exactly this spec."""
    if spec.family not in FAMILIES:
        raise InputError(
            f"there is no Hugging Face format for the family {spec.family!r}; families that have "
            f"one are {', '.join(FAMILIES)}"
        )
    values = {"model_type": spec.family, "architectures": [CLASSES[spec.family]]}
    values |= FAMILIES[spec.family][1](spec)
    again = to_spec(values, "the exported config.json")
    for field in dataclasses.fields(spec):
        if getattr(spec, field.name) != getattr(again, field.name):
            raise InputError(
                f"a {spec.family} checkpoint cannot say {field.name} = "
                f"{str(getattr(spec, field.name))[:80]} (only "
                f"{str(getattr(again, field.name))[:80]}); save it in the native format"
            )
    return values


# --- Llama and its relatives ----------------------------------------------------------------------


def _llama_like(fields: Fields, family: str, **own: Any) -> ModelSpec:
    """Spec of a pre-norm, gated, grouped-query decoder; `own` is what the family does otherwise."""
    width, heads, layers = (
        fields[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = fields.get("head_dim") or _head_dim(fields, width, heads)
    activation = own.pop("activation", None) or fields.activation("hidden_act")
    gated = MLPSpec(fields["intermediate_size"], activation, True, fields.get("mlp_bias", False))
    bias = fields.get("attention_bias", False)
    facts = {
        "family": family,
        "vocab_size": fields["vocab_size"],
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "mlp": gated,
        "norm": NormSpec("rms", fields["rms_norm_eps"], bias=False, scale_offset=0.0),
        "encoding": hf_rotary.read(fields, head_dim),
        "trained_length": fields["max_position_embeddings"],
        "windows": None if "windows" in own else _by_type(fields, None) or (None,) * layers,
        "residual": "sequential",
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": False,
        "post_norms": False,
        "query_scale": head_dim**-0.5,
        "qkv_clip": None,
        "attention_soft_cap": None,
        "final_soft_cap": None,
        "embed_scale": 1.0,
        "tied": fields.get("tie_word_embeddings", False),
        "head_bias": False,
    }
    return ModelSpec(**(facts | own))


def _head_dim(fields: Fields, width: int, heads: int) -> int:
    """Channels of a head where the file does not say them."""
    if heads > width:
        raise InputError(
            f"{fields.source} divides {width} channels among {heads} heads, which no model can do; "
            f"fetch the file again"
        )
    return width // heads


def _llama(fields: Fields, family: str) -> ModelSpec:
    fields.only("rope_interleaved", False)
    return _llama_like(fields, family)


def _mistral(fields: Fields, family: str) -> ModelSpec:
    window, layers = fields.stated("sliding_window"), fields["num_hidden_layers"]
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    windows = _by_type(fields, window) or (window,) * layers
    return _llama_like(fields, family, windows=windows)


def _qwen(fields: Fields, family: str) -> ModelSpec:
    layers = fields["num_hidden_layers"]
    slides = fields.get("use_sliding_window", False)
    window = fields["sliding_window"] if slides else fields.ignored("sliding_window")
    first = fields["max_window_layers"] if slides else fields.ignored("max_window_layers", layers)
    windows = tuple(window if layer >= first else None for layer in range(layers))
    fields.only("mlp_bias", False)
    extra: dict[str, Any] = {"windows": _by_type(fields, window) or windows}
    if family == "qwen2":
        fields.only("attention_bias", True)
        extra |= {"qkv_bias": True, "out_bias": False}
    else:
        fields["head_dim"]  # the default of its absence is one model's
        extra |= {"qk_norm": True}
    return _llama_like(fields, family, **extra)


def _gemma2(fields: Fields, family: str) -> ModelSpec:
    window, layers = fields["sliding_window"], fields["num_hidden_layers"]
    alternating = tuple(None if layer % 2 else window for layer in range(layers))
    fields.only("mlp_bias", False)
    fields.only("use_bidirectional_attention", False)
    fields.ignored("hidden_act")  # older files have both; the model runs hidden_activation
    fields.same("sliding_window_size", window)
    fields["head_dim"]
    return _llama_like(
        fields,
        family,
        activation=fields.activation("hidden_activation"),
        norm=NormSpec("rms", fields["rms_norm_eps"], bias=False, scale_offset=1.0),
        windows=_by_type(fields, window) or alternating,
        post_norms=True,
        query_scale=fields["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=fields.stated("attn_logit_softcapping"),
        final_soft_cap=fields.stated("final_logit_softcapping"),
        embed_scale=fields["hidden_size"] ** 0.5,
        tied=fields.get("tie_word_embeddings", True),
    )


def _by_type(fields: Fields, window: int | None) -> tuple[int | None, ...] | None:
    """Windows of the layers where the file lists a type for each, else None."""
    types = fields.get("layer_types")
    if types is None:
        return None
    known = {"full_attention": None, "sliding_attention": window}
    if odd := set(types) - set(known):
        raise InputError(
            f"{fields.source} has layers of the type {odd.pop()!r}; full_attention and "
            f"sliding_attention are read"
        )
    if "sliding_attention" in types and window is None:
        raise InputError(
            f"{fields.source} has layers of the type 'sliding_attention' but no sliding_window; "
            f"fetch the file again"
        )
    return tuple(known[kind] for kind in types)


def _llama_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp.hidden_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": ACTIVATION_NAMES[spec.mlp.activation],
        "max_position_embeddings": spec.trained_length,
        "rms_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
        **hf_rotary.write(spec.encoding),
    }


def _bias_fields(spec: ModelSpec) -> dict[str, Any]:
    return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp.bias}


def _mistral_fields(spec: ModelSpec) -> dict[str, Any]:
    return _llama_fields(spec) | {"sliding_window": spec.windows[0]}


def _qwen_fields(spec: ModelSpec) -> dict[str, Any]:
    types = ["full_attention" if w is None else "sliding_attention" for w in spec.windows]
    window = next((w for w in spec.windows if w is not None), None)
    extra = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types,
    }
    # transformers wants the number of the first layer that slides, whatever the types say.
    extra["max_window_layers"] = types.index("sliding_attention") if window else spec.num_layers
    if spec.family == "qwen3":
        extra["attention_bias"] = spec.qkv_bias
    return _llama_fields(spec) | extra


def _gemma2_fields(spec: ModelSpec) -> dict[str, Any]:
    scalar = spec.query_scale**-2
    return _llama_fields(spec) | {
        "hidden_activation": ACTIVATION_NAMES[spec.mlp.activation],
        "attention_bias": spec.qkv_bias,
        "sliding_window": next((w for w in spec.windows if w is not None), None),
        "layer_types": [
            "full_attention" if w is None else "sliding_attention" for w in spec.windows
        ],
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": spec.attention_soft_cap,
        "final_logit_softcapping": spec.final_soft_cap,
    }


# --- GPT-NeoX, GPT-J, MPT -------------------------------------------------------------------------


def _plain(family: str, fields: Fields, **own: Any) -> ModelSpec:
    """Spec of a decoder with layer norms, as many key heads as query heads and a plain MLP."""
    facts = {
        "family": family,
        "num_kv_heads": own["num_heads"],
        "windows": (None,) * own["num_layers"],
        "qk_norm": False,
        "post_norms": False,
        "query_scale": own["head_dim"] ** -0.5,
        "qkv_clip": None,
        "attention_soft_cap": None,
        "final_soft_cap": None,
        "embed_scale": 1.0,
        "head_bias": False,
        "vocab_size": fields["vocab_size"],
    }
    return ModelSpec(**(facts | own))


def _gpt_neox(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    bias = fields.get("attention_bias", True)
    mlp = MLPSpec(fields["intermediate_size"], fields.activation("hidden_act"), False, bias=True)
    return _plain(
        family,
        fields,
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        head_dim=_head_dim(fields, width, heads),
        mlp=mlp,
        norm=NormSpec("layer", fields["layer_norm_eps"], bias=True, scale_offset=0.0),
        encoding=hf_rotary.read(fields, _head_dim(fields, width, heads)),
        trained_length=fields["max_position_embeddings"],
        residual="parallel" if fields.get("use_parallel_residual", True) else "sequential",
        qkv_bias=bias,
        out_bias=bias,
        tied=fields.get("tie_word_embeddings", False),
    )


def _gpt_neox_fields(spec: ModelSpec) -> dict[str, Any]:
    encoding = spec.encoding
    rotated = (encoding.dim or 0) if isinstance(encoding, rope.Rotary) else 0
    rotary = hf_rotary.write(encoding)
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp.hidden_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "hidden_act": ACTIVATION_NAMES[spec.mlp.activation],
        "max_position_embeddings": spec.trained_length,
        "layer_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.qkv_bias,
        "use_parallel_residual": spec.residual == "parallel",
        "rotary_pct": rotated / spec.head_dim,
        "rotary_emb_base": rotary.pop("rope_theta", None),
        **rotary,
    }


def _gptj(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["n_embd"], fields["n_head"]
    fields.only("rotary", True)
    fields.only("scale_attn_weights", True)
    activation = fields.activation("activation_function")
    return _plain(
        family,
        fields,
        width=width,
        num_layers=fields["n_layer"],
        num_heads=heads,
        head_dim=_head_dim(fields, width, heads),
        mlp=MLPSpec(fields.get("n_inner", 4 * width), activation, gated=False, bias=True),
        norm=NormSpec("layer", fields["layer_norm_epsilon"], bias=True, scale_offset=0.0),
        encoding=rope.Rotary(10000.0, fields["rotary_dim"], "interleaved"),
        trained_length=fields["n_positions"],
        residual="parallel_shared",
        qkv_bias=False,
        out_bias=False,
        tied=fields.get("tie_word_embeddings", False),
        head_bias=True,
    )


def _gptj_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.width,
        "n_inner": spec.mlp.hidden_dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_positions": spec.trained_length,
        "rotary_dim": spec.encoding.dim if isinstance(spec.encoding, rope.Rotary) else 0,
        "activation_function": ACTIVATION_NAMES[spec.mlp.activation],
        "layer_norm_epsilon": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
    }


def _mpt(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["d_model"], fields["n_heads"]
    attention = fields.part("attn_config", ATTENTION_SHAPE, MEANINGLESS)
    attention.only("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id", "qk_gn", "rope"):
        attention.only(name, False)
    attention.only("alibi", True)
    fields.ignored("learned_pos_emb")  # not used beside ALiBi
    fields.only("norm_type", "low_precision_layernorm", "layernorm")
    fields.only("no_bias", True)
    fields.only("fc_type", "torch")
    mlp = {"ffn_type": "mptmlp"}
    fields.only("ffn_config", mlp, mlp | {"fc_type": "torch"}, {})
    clip = attention.get("clip_qkv")
    spec = _plain(
        family,
        fields,
        width=width,
        num_layers=fields["n_layers"],
        num_heads=heads,
        head_dim=_head_dim(fields, width, heads),
        mlp=MLPSpec(fields["expansion_ratio"] * width, "gelu", gated=False, bias=False),
        norm=NormSpec("layer", fields.get("layer_norm_epsilon", 1e-5), False, scale_offset=0.0),
        encoding=rope.Alibi(float(attention.get("alibi_bias_max", 8))),
        trained_length=fields["max_seq_len"],
        residual="sequential",
        qkv_bias=False,
        out_bias=False,
        query_scale=attention.get("softmax_scale", (width // heads) ** -0.5),
        qkv_clip=None if clip is None else float(clip),
        tied=fields.get("tie_word_embeddings", True),
    )
    attention.refuse_others()
    return spec


def _mpt_fields(spec: ModelSpec) -> dict[str, Any]:
    usual = spec.head_dim**-0.5
    bias_max = spec.encoding.max_bias if isinstance(spec.encoding, rope.Alibi) else 0.0
    return {
        "vocab_size": spec.vocab_size,
        "d_model": spec.width,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_heads,
        "expansion_ratio": spec.mlp.hidden_dim // spec.width,
        "max_seq_len": spec.trained_length,
        "layer_norm_epsilon": spec.norm.epsilon,
        "learned_pos_emb": False,
        "no_bias": True,
        "tie_word_embeddings": spec.tied,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": round(bias_max),
            "clip_qkv": spec.qkv_clip,
            "softmax_scale": None if spec.query_scale == usual else spec.query_scale,
        },
    }


# family -> (fields to spec, spec to fields)
FAMILIES: dict[
    str, tuple[Callable[[Fields, str], ModelSpec], Callable[[ModelSpec], dict[str, Any]]]
] = {
    "llama": (_llama, lambda spec: _llama_fields(spec) | _bias_fields(spec)),
    "mistral": (_mistral, _mistral_fields),
    "qwen2": (_qwen, _qwen_fields),
    "qwen3": (_qwen, _qwen_fields),
    "gemma2": (_gemma2, _gemma2_fields),
    "gpt_neox": (_gpt_neox, _gpt_neox_fields),
    "gptj": (_gptj, _gptj_fields),
    "mpt": (_mpt, _mpt_fields),
}
