"""GPT-2 and OPT: positions are learnt and added to the embeddings."""

from typing import Any

from lminf.attention import rope
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.families.family import Family, divided, layer_norm, plain
from lminf.checkpoints.weight_maps import norm, row
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec


def _gpt2(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["n_embd"], fields["n_head"]
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.ignored("reorder_and_upcast_attn")  # of float16 only
    activation = fields.activation("activation_function")
    return plain(
        family,
        fields,
        width=width,
        num_layers=fields["n_layer"],
        num_heads=heads,
        head_dim=divided(fields, width, heads),
        mlp=MLPSpec(fields.get("n_inner", 4 * width), activation, gated=False, bias=True),
        norm=layer_norm(fields, "layer_norm_epsilon", bias=True),
        encoding=rope.Learnt(fields["n_positions"], 0),
        trained_length=fields["n_positions"],
        residual="sequential",
        qkv_bias=True,
        out_bias=True,
        tied=fields.get("tie_word_embeddings", True),
    )


def _gpt2_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.width,
        "n_inner": spec.mlp.hidden_dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_positions": spec.trained_length,
        "activation_function": ACTIVATION_NAMES[spec.mlp.activation],
        "layer_norm_epsilon": spec.norm.epsilon,
        "tie_word_embeddings": spec.tied,
    }


def _opt(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    fields.only("do_layer_norm_before", True)
    fields.only("_remove_final_layer_norm", False)
    fields.only("word_embed_proj_dim", width)
    fields.only("layer_norm_elementwise_affine", True)
    bias = fields.get("enable_bias", True)
    activation = fields.activation("activation_function")
    return plain(
        family,
        fields,
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        head_dim=divided(fields, width, heads),
        mlp=MLPSpec(fields["ffn_dim"], activation, gated=False, bias=bias),
        norm=NormSpec("layer", 1e-5, bias=True, scale_offset=0.0),  # torch's; no field says it
        encoding=rope.Learnt(fields["max_position_embeddings"], 2),
        trained_length=fields["max_position_embeddings"],
        residual="sequential",
        qkv_bias=bias,
        out_bias=bias,
        tied=fields.get("tie_word_embeddings", True),
    )


def _opt_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "word_embed_proj_dim": spec.width,
        "ffn_dim": spec.mlp.hidden_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.trained_length,
        "activation_function": ACTIVATION_NAMES[spec.mlp.activation],
        "do_layer_norm_before": True,
        "enable_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tied,
    }


# --- Weight maps ----------------------------------------------------------------------------------

_GPT2 = [
    row("transformer.wte.weight", "embed", "v d"),
    row("transformer.wpe.weight", "positions", "r d"),
    *norm("transformer.h.{}.ln_1", "layers/attention_norm"),
    *norm("transformer.h.{}.ln_2", "layers/mlp_norm"),
    row(
        "transformer.h.{}.attn.c_attn.weight",
        "layers/attention/{wq,wk,wv}",
        "d (three n h) -> three d n h",
    ),
    row(
        "transformer.h.{}.attn.c_attn.bias",
        "layers/attention/{bq,bk,bv}",
        "(three n h) -> three n h",
    ),
    row("transformer.h.{}.attn.c_proj.weight", "layers/attention/wo", "(n h) d -> n h d"),
    row("transformer.h.{}.attn.c_proj.bias", "layers/attention/bo", "d"),
    row("transformer.h.{}.mlp.c_fc.weight", "layers/mlp/w_up", "d f"),
    row("transformer.h.{}.mlp.c_fc.bias", "layers/mlp/b_up", "f"),
    row("transformer.h.{}.mlp.c_proj.weight", "layers/mlp/w_down", "f d"),
    row("transformer.h.{}.mlp.c_proj.bias", "layers/mlp/b_down", "d"),
    *norm("transformer.ln_f", "final_norm"),
    row("lm_head.weight", "head", "v d"),
]
_OPT_LAYER = "model.decoder.layers.{}"
_OPT = [
    row("model.decoder.embed_tokens.weight", "embed", "v d"),
    row("model.decoder.embed_positions.weight", "positions", "r d"),
    *norm(f"{_OPT_LAYER}.self_attn_layer_norm", "layers/attention_norm"),
    *norm(f"{_OPT_LAYER}.final_layer_norm", "layers/mlp_norm"),
    row(f"{_OPT_LAYER}.self_attn.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row(f"{_OPT_LAYER}.self_attn.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row(f"{_OPT_LAYER}.self_attn.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row(f"{_OPT_LAYER}.self_attn.q_proj.bias", "layers/attention/bq", "(n h) -> n h"),
    row(f"{_OPT_LAYER}.self_attn.k_proj.bias", "layers/attention/bk", "(k h) -> k h"),
    row(f"{_OPT_LAYER}.self_attn.v_proj.bias", "layers/attention/bv", "(k h) -> k h"),
    row(f"{_OPT_LAYER}.self_attn.out_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row(f"{_OPT_LAYER}.self_attn.out_proj.bias", "layers/attention/bo", "d"),
    row(f"{_OPT_LAYER}.fc1.weight", "layers/mlp/w_up", "f d -> d f"),
    row(f"{_OPT_LAYER}.fc1.bias", "layers/mlp/b_up", "f"),
    row(f"{_OPT_LAYER}.fc2.weight", "layers/mlp/w_down", "d f -> f d"),
    row(f"{_OPT_LAYER}.fc2.bias", "layers/mlp/b_down", "d"),
    *norm("model.decoder.final_layer_norm", "final_norm"),
    row("lm_head.weight", "head", "v d"),
]

FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _gpt2_fields, _GPT2),
    "opt": Family("OPTForCausalLM", _opt, _opt_fields, _OPT),
}
