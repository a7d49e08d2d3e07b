"""GPT-NeoX, GPT-J and MPT: layer norms and a plain MLP."""

from typing import Any

from lminf.attention import rope
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import ACTIVATION_NAMES, Fields
from lminf.checkpoints.families.family import Family, divided, layer_norm, plain, share_rotated
from lminf.checkpoints.hf_fields import ATTENTION_SHAPE, MEANINGLESS
from lminf.checkpoints.weight_maps import norm, row
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec


def _gpt_neox(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    bias = fields.get("attention_bias", True)
    mlp = MLPSpec(fields["intermediate_size"], fields.activation("hidden_act"), False, bias=True)
    return plain(
        family,
        fields,
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        head_dim=divided(fields, width, heads),
        mlp=mlp,
        norm=layer_norm(fields, "layer_norm_eps", bias=True),
        encoding=hf_rotary.read(fields, divided(fields, width, heads)),
        trained_length=fields["max_position_embeddings"],
        residual="parallel" if fields.get("use_parallel_residual", True) else "sequential",
        qkv_bias=bias,
        out_bias=bias,
        tied=fields.get("tie_word_embeddings", False),
    )


def _gpt_neox_fields(spec: ModelSpec) -> dict[str, Any]:
    rotary = hf_rotary.write(spec.encoding)
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
        "rotary_pct": share_rotated(spec),
        "rotary_emb_base": rotary.pop("rope_theta", None),
        **rotary,
    }


def _gptj(fields: Fields, family: str) -> ModelSpec:
    width, heads = fields["n_embd"], fields["n_head"]
    fields.only("rotary", True)
    fields.only("scale_attn_weights", True)
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
    spec = plain(
        family,
        fields,
        width=width,
        num_layers=fields["n_layers"],
        num_heads=heads,
        head_dim=divided(fields, width, heads),
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


# --- Weight maps ----------------------------------------------------------------------------------

_GPT_NEOX = [
    row("gpt_neox.embed_in.weight", "embed", "v d"),
    *norm("gpt_neox.layers.{}.input_layernorm", "layers/attention_norm"),
    *norm("gpt_neox.layers.{}.post_attention_layernorm", "layers/mlp_norm"),
    row(
        "gpt_neox.layers.{}.attention.query_key_value.weight",
        "layers/attention/{wq,wk,wv}",
        "(n three h) d -> three d n h",
    ),
    row(
        "gpt_neox.layers.{}.attention.query_key_value.bias",
        "layers/attention/{bq,bk,bv}",
        "(n three h) -> three n h",
    ),
    row("gpt_neox.layers.{}.attention.dense.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("gpt_neox.layers.{}.attention.dense.bias", "layers/attention/bo", "d"),
    row("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "layers/mlp/w_up", "f d -> d f"),
    row("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "layers/mlp/b_up", "f"),
    row("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "layers/mlp/w_down", "d f -> f d"),
    row("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "layers/mlp/b_down", "d"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    row("embed_out.weight", "head", "v d"),
]
_GPTJ = [
    row("transformer.wte.weight", "embed", "v d"),
    *norm("transformer.h.{}.ln_1", "layers/attention_norm"),
    row("transformer.h.{}.attn.q_proj.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row("transformer.h.{}.attn.k_proj.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row("transformer.h.{}.attn.v_proj.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row("transformer.h.{}.attn.out_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("transformer.h.{}.mlp.fc_in.weight", "layers/mlp/w_up", "f d -> d f"),
    row("transformer.h.{}.mlp.fc_in.bias", "layers/mlp/b_up", "f"),
    row("transformer.h.{}.mlp.fc_out.weight", "layers/mlp/w_down", "d f -> f d"),
    row("transformer.h.{}.mlp.fc_out.bias", "layers/mlp/b_down", "d"),
    *norm("transformer.ln_f", "final_norm"),
    row("lm_head.weight", "head", "v d"),
    row("lm_head.bias", "head_bias", "v"),
]
_MPT = [
    row("transformer.wte.weight", "embed", "v d"),
    *norm("transformer.blocks.{}.norm_1", "layers/attention_norm"),
    *norm("transformer.blocks.{}.norm_2", "layers/mlp_norm"),
    row(
        "transformer.blocks.{}.attn.Wqkv.weight",
        "layers/attention/{wq,wk,wv}",
        "(three n h) d -> three d n h",
    ),
    row("transformer.blocks.{}.attn.out_proj.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("transformer.blocks.{}.ffn.up_proj.weight", "layers/mlp/w_up", "f d -> d f"),
    row("transformer.blocks.{}.ffn.down_proj.weight", "layers/mlp/w_down", "d f -> f d"),
    *norm("transformer.norm_f", "final_norm"),
    row("lm_head.weight", "head", "v d"),
]

FAMILIES = {
    "gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox, _gpt_neox_fields, _GPT_NEOX),
    "gptj": Family("GPTJForCausalLM", _gptj, _gptj_fields, _GPTJ),
    "mpt": Family("MptForCausalLM", _mpt, _mpt_fields, _MPT),
}
