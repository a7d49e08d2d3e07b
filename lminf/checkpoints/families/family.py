"""What a family of models is to a Hugging Face folder, and what families share.

A family is a reader of config.json, the writer of it, and a weight map; docs/adding_a_model.md
writes one from the beginning.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lminf.attention import rope
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.weight_maps import Row, norm, row
from lminf.errors import InputError
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`."""

    model_class: str  # what transformers calls the model
    to_spec: Callable[[Fields, str], ModelSpec]  # (fields of config.json, model_type)
    to_fields: Callable[[ModelSpec], dict[str, Any]]
    rows: list[Row] | Callable[[ModelSpec], list[Row]]

    def rows_of(self, spec: ModelSpec) -> list[Row]:
        """The weight map of one of the family's models."""
        return self.rows if isinstance(self.rows, list) else self.rows(spec)


# --- Readers --------------------------------------------------------------------------------------


def llama_like(
    fields: Fields, family: str, *, rotary: Mapping[str, Any] | None = None, **spec_fields: Any
) -> ModelSpec:
    """Spec of a pre-norm, gated, grouped-query decoder; `own` is what the family does otherwise,
    `rotary` what its rotary encoding is where the file does not say it.
    """
    width, heads, layers = (
        fields[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = (
        spec_fields.pop("head_dim", None) or fields.get("head_dim") or divided(fields, width, heads)
    )
    mlp = spec_fields.pop("mlp", None)
    if mlp is None:
        activation = spec_fields.pop("activation", None) or fields.activation("hidden_act")
        mlp_bias = fields.get("mlp_bias", False)
        mlp = MLPSpec(fields["intermediate_size"], activation, gated=True, bias=mlp_bias)
    bias = fields.get("attention_bias", False)
    facts = {
        "family": family,
        "vocab_size": fields["vocab_size"],
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "mlp": mlp,
        "norm": None if "norm" in spec_fields else rms(fields),
        "encoding": None
        if "encoding" in spec_fields
        else hf_rotary.read(fields, head_dim, **(rotary or {})),
        "trained_length": fields["max_position_embeddings"],
        "windows": None if "windows" in spec_fields else by_type(fields, None) or (None,) * layers,
        "residual": "sequential",
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": None,
        "post_norms": False,
        "query_scale": head_dim**-0.5,
        "qkv_clip": None,
        "attention_soft_cap": None,
        "final_soft_cap": None,
        "embed_scale": 1.0,
        "tied": fields.get("tie_word_embeddings", False),
        "head_bias": False,
    }
    return ModelSpec(**(facts | spec_fields))


def plain(family: str, fields: Fields, **spec_fields: Any) -> ModelSpec:
    """Spec of a decoder with layer norms, as many key heads as query heads and a plain MLP."""
    facts = {
        "family": family,
        "num_kv_heads": spec_fields["num_heads"],
        "windows": (None,) * spec_fields["num_layers"],
        "qk_norm": None,
        "post_norms": False,
        "query_scale": spec_fields["head_dim"] ** -0.5,
        "qkv_clip": None,
        "attention_soft_cap": None,
        "final_soft_cap": None,
        "embed_scale": 1.0,
        "head_bias": False,
        "vocab_size": fields["vocab_size"],
    }
    return ModelSpec(**(facts | spec_fields))


def rms(fields: Fields, *, scale_offset: float = 0.0) -> NormSpec:
    """The RMS norm of the file."""
    return NormSpec("rms", fields["rms_norm_eps"], bias=False, scale_offset=scale_offset)


def layer_norm(fields: Fields, name: str, *, bias: bool) -> NormSpec:
    """The layer norm whose epsilon the file calls `name`."""
    return NormSpec("layer", fields[name], bias=bias, scale_offset=0.0)


def divided(fields: Fields, width: int, heads: int) -> int:
    """Channels of a head where the file does not say them."""
    if heads > width:
        raise InputError(
            f"{fields.source} divides {width} channels among {heads} heads, which no model can do; "
            f"fetch the file again"
        )
    return width // heads


def by_type(fields: Fields, window: int | None) -> tuple[int | None, ...] | None:
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


def every(layers: int, pattern: int, window: int | None) -> tuple[int | None, ...]:
    """Windows of layers of which each `pattern`-th sees everything, the last of its pattern."""
    return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(layers))


def differing(
    encoding: rope.Encoding, by_layer: tuple[rope.Encoding, ...]
) -> tuple[rope.Encoding | None, ...]:
    """`ModelSpec.layer_encodings` of layers with these encodings."""
    encodings = tuple(None if one == encoding else one for one in by_layer)
    return encodings if any(one is not None for one in encodings) else ()


# --- Writers --------------------------------------------------------------------------------------


def llama_fields(spec: ModelSpec) -> dict[str, Any]:
    """What Llama and most of its relatives call the facts that they share."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp.hidden_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": ACTIVATION_NAMES.get(spec.mlp.activation),
        "max_position_embeddings": spec.trained_length,
        "rms_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.qkv_bias,
        **hf_rotary.write(spec.encoding),
    }


def window_fields(spec: ModelSpec) -> dict[str, Any]:
    """The window of the layers that have one, and which those are."""
    return {
        "sliding_window": next((w for w in spec.windows if w is not None), None),
        "layer_types": [
            "full_attention" if w is None else "sliding_attention" for w in spec.windows
        ],
    }


def type_encodings(spec: ModelSpec) -> tuple[rope.Encoding, rope.Encoding]:
    """The encodings of layers with full and with sliding attention."""
    sliding = (e for e, w in zip(spec.encodings, spec.windows, strict=True) if w is not None)
    return spec.encoding, next(sliding, spec.encoding)


def share_rotated(spec: ModelSpec) -> float:
    """The share of a head's channels that are rotated."""
    rotated = (spec.encoding.dim or 0) if isinstance(spec.encoding, rope.Rotary) else 0
    return rotated / spec.head_dim


# --- Weight maps ----------------------------------------------------------------------------------

_ATTENTION = "model.layers.{}.self_attn"
ENDS = [
    row("model.embed_tokens.weight", "embed", "v d"),
    *norm("model.norm", "final_norm"),
    row("lm_head.weight", "head", "v d"),
]
ATTENTION = [
    row(f"{_ATTENTION}.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row(f"{_ATTENTION}.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row(f"{_ATTENTION}.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row(f"{_ATTENTION}.q_proj.bias", "layers/attention/bq", "(n h) -> n h"),
    row(f"{_ATTENTION}.k_proj.bias", "layers/attention/bk", "(k h) -> k h"),
    row(f"{_ATTENTION}.v_proj.bias", "layers/attention/bv", "(k h) -> k h"),
    row(f"{_ATTENTION}.q_norm.weight", "layers/attention/q_norm/scale", "h"),
    row(f"{_ATTENTION}.k_norm.weight", "layers/attention/k_norm/scale", "h"),
    row(f"{_ATTENTION}.o_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row(f"{_ATTENTION}.o_proj.bias", "layers/attention/bo", "d"),
]
MLP = [
    row("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/w_gate", "f d -> d f"),
    row("model.layers.{}.mlp.up_proj.weight", "layers/mlp/w_up", "f d -> d f"),
    row("model.layers.{}.mlp.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
    row("model.layers.{}.mlp.gate_proj.bias", "layers/mlp/b_gate", "f"),
    row("model.layers.{}.mlp.up_proj.bias", "layers/mlp/b_up", "f"),
    row("model.layers.{}.mlp.down_proj.bias", "layers/mlp/b_down", "d"),
]
JOINED_MLP = [
    row(
        "model.layers.{}.mlp.gate_up_proj.weight",
        "layers/mlp/{w_gate,w_up}",
        "(two f) d -> two d f",
    ),
    row("model.layers.{}.mlp.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
]


def layer_norms(**places: str) -> list[Row]:
    """Rows of norms of the layers: their name in the file = their place in a layer."""
    return [
        one
        for name, place in places.items()
        for one in norm(f"model.layers.{{}}.{name}", f"layers/{place}")
    ]


PRE_NORMS = layer_norms(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
LLAMA = [*ENDS, *ATTENTION, *MLP, *PRE_NORMS]
