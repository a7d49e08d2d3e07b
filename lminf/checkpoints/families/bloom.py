"""BLOOM and Falcon: ALiBi or rotary, and projections joined head by head."""

from typing import Any

from lminf.attention import rope
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.families.family import Family, divided, layer_norm, plain
from lminf.checkpoints.weight_maps import Row, norm, row
from lminf.models.spec import MLPSpec, ModelSpec


def _bloom(fields: Fields, family: str) -> ModelSpec:
    names = [name for name in ("hidden_size", "n_embed") if fields.get(name) is not None]
    width = fields[names[0] if names else "hidden_size"]
    fields.same("n_embed", width)
    layers, heads = (
        fields[old if fields.get(old) is not None else new]
        for old, new in (("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"))
    )
    fields.same("num_hidden_layers", layers)
    fields.same("num_attention_heads", heads)
    fields.only("apply_residual_connection_post_layernorm", False)
    for name in ("slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion",
                 "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv", "seq_length",
                 "offset_alibi"):  # fmt: skip
        fields.ignored(name)  # of how it was trained, or where products are rounded
    return plain(
        family,
        fields,
        width=width,
        num_layers=layers,
        num_heads=heads,
        head_dim=divided(fields, width, heads),
        mlp=MLPSpec(4 * width, "gelu_tanh", gated=False, bias=True),
        norm=layer_norm(fields, "layer_norm_epsilon", bias=True),
        encoding=rope.Alibi(8.0),
        trained_length=2048,  # of every release; ALiBi has no longest text
        residual="sequential",
        qkv_bias=True,
        out_bias=True,
        embed_norm=True,
        tied=fields.get("tie_word_embeddings", True),
    )


def _bloom_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "layer_norm_epsilon": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
    }


def _falcon(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim, bias = divided(fields, width, heads), fields.get("bias", False)
    newer, alibi = fields.get("new_decoder_architecture", False), fields.get("alibi", False)
    one_head = fields.get("multi_query", True)
    kv_heads = fields.get("num_kv_heads", heads) if newer or not one_head else 1
    fields.ignored("num_kv_heads")
    if alibi:
        fields.ignored("rope_theta")
        fields.ignored("rope_parameters")
    parallel = newer or fields.get("parallel_attn", True)
    norms = fields.get("num_ln_in_parallel_attn", 2 if newer else 1)
    if newer:
        fields.only("parallel_attn", True)
    residual = "sequential" if not parallel else "parallel" if norms == 2 else "parallel_shared"
    fields.ignored("ffn_hidden_size")
    return plain(
        family,
        fields,
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=MLPSpec(
            fields.get("ffn_hidden_size", 4 * width),
            fields.activation("activation") if "activation" in fields.values else "gelu",
            gated=False,
            bias=bias,
        ),
        norm=layer_norm(fields, "layer_norm_epsilon", bias=True),
        # transformers rounds ALiBi's products to bfloat16; they are exact here.
        encoding=rope.Alibi(8.0, head_dim**-0.5) if alibi else hf_rotary.read(fields, head_dim),
        trained_length=fields.get("max_position_embeddings", 2048),
        residual=residual,
        qkv_bias=bias,
        out_bias=bias,
        tied=fields.get("tie_word_embeddings", True),
    )


def _falcon_fields(spec: ModelSpec) -> dict[str, Any]:
    newer = 1 < spec.num_kv_heads < spec.num_heads or spec.residual == "parallel"
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "ffn_hidden_size": spec.mlp.hidden_dim,
        "activation": ACTIVATION_NAMES[spec.mlp.activation],
        "layer_norm_epsilon": spec.norm.epsilon,
        "alibi": isinstance(spec.encoding, rope.Alibi),
        "new_decoder_architecture": newer,
        "num_ln_in_parallel_attn": 2 if spec.residual == "parallel" else 1,
        "multi_query": spec.num_kv_heads == 1,
        "parallel_attn": spec.residual != "sequential",
        "bias": spec.qkv_bias,
        "max_position_embeddings": spec.trained_length,
        "tie_word_embeddings": spec.tied,
        **hf_rotary.write(spec.encoding),
    }


# --- Weight maps ----------------------------------------------------------------------------------

_BLOOM_LAYER = "transformer.h.{}"
_BLOOM_LIKE = [
    row("transformer.word_embeddings.weight", "embed", "v d"),
    row(f"{_BLOOM_LAYER}.self_attention.dense.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row(f"{_BLOOM_LAYER}.self_attention.dense.bias", "layers/attention/bo", "d"),
    row(f"{_BLOOM_LAYER}.mlp.dense_h_to_4h.weight", "layers/mlp/w_up", "f d -> d f"),
    row(f"{_BLOOM_LAYER}.mlp.dense_h_to_4h.bias", "layers/mlp/b_up", "f"),
    row(f"{_BLOOM_LAYER}.mlp.dense_4h_to_h.weight", "layers/mlp/w_down", "d f -> f d"),
    row(f"{_BLOOM_LAYER}.mlp.dense_4h_to_h.bias", "layers/mlp/b_down", "d"),
    *norm("transformer.ln_f", "final_norm"),
    row("lm_head.weight", "head", "v d"),
]
_BLOOM = [
    *_BLOOM_LIKE,
    *norm("transformer.word_embeddings_layernorm", "embed_norm"),
    *norm(f"{_BLOOM_LAYER}.input_layernorm", "layers/attention_norm"),
    *norm(f"{_BLOOM_LAYER}.post_attention_layernorm", "layers/mlp_norm"),
    row(
        f"{_BLOOM_LAYER}.self_attention.query_key_value.weight",
        "layers/attention/{wq,wk,wv}",
        "(n three h) d -> three d n h",
    ),
    row(
        f"{_BLOOM_LAYER}.self_attention.query_key_value.bias",
        "layers/attention/{bq,bk,bv}",
        "(n three h) -> three n h",
    ),
]
# Of every key head its query heads, its key and its value: of all Falcons, whatever their number.
_FALCON = [
    *_BLOOM_LIKE,
    row(
        f"{_BLOOM_LAYER}.self_attention.query_key_value.weight",
        "layers/attention/{wq,wk,wv}",
        "(k g* h) d -> d (k g) h + (k one* h) d -> d (k one) h + (k one* h) d -> d (k one) h",
    ),
    row(
        f"{_BLOOM_LAYER}.self_attention.query_key_value.bias",
        "layers/attention/{bq,bk,bv}",
        "(k g* h) -> (k g) h + (k one* h) -> (k one) h + (k one* h) -> (k one) h",
    ),
]


def _falcon_rows(spec: ModelSpec) -> list[Row]:
    """The rows of Falcon, whose releases have one norm, two of a kind, or one before the other."""
    before_both = {"input_layernorm": "attention_norm"}
    names = {
        "parallel_shared": before_both,
        "parallel": {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"},
        "sequential": before_both | {"post_attention_layernorm": "mlp_norm"},
    }[spec.residual]
    norms = (norm(f"{_BLOOM_LAYER}.{name}", f"layers/{place}") for name, place in names.items())
    return [*_FALCON, *(one for rows in norms for one in rows)]


FAMILIES = {
    "bloom": Family("BloomForCausalLM", _bloom, _bloom_fields, _BLOOM),
    "falcon": Family("FalconForCausalLM", _falcon, _falcon_fields, _falcon_rows),
}
