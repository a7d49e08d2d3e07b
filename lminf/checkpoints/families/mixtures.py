"""Mixtures of experts."""

import dataclasses
from typing import Any

from lminf.attention import rope
from lminf.checkpoints.config_fields import Fields
from lminf.checkpoints.families.family import (
    ATTENTION,
    ENDS,
    PRE_NORMS,
    Family,
    by_type,
    every,
    llama_fields,
    llama_like,
    window_fields,
)
from lminf.checkpoints.families.llama import qwen, qwen_fields
from lminf.checkpoints.weight_maps import row
from lminf.models.spec import MLPSpec, ModelSpec, MoESpec

# Losses and noise of training, which reading a model does not use.
_TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


def _experts(fields: Fields, hidden: str, *, normalised: bool) -> MoESpec:
    for name in _TRAINING:
        fields.ignored(name)
    experts = fields.get("num_experts")  # the name in most files; transformers 5 writes the other
    experts = fields["num_local_experts"] if experts is None else experts
    fields.same("num_local_experts", experts)
    return MoESpec(
        experts=experts,
        top_k=fields["num_experts_per_tok"],
        hidden_dim=fields[hidden],
        shared_dim=0,
        dense_layers=0,
        normalised=normalised,
        capacity_factor=None,
    )


def _mixtral(fields: Fields, family: str) -> ModelSpec:
    window = fields.stated("sliding_window")
    return llama_like(
        fields,
        family,
        rotary={"base": None},
        windows=(window,) * fields["num_hidden_layers"],
        moe=_experts(fields, "intermediate_size", normalised=True),
    )


def _mixtral_fields(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    return llama_fields(spec) | {
        "sliding_window": spec.windows[0],
        "num_local_experts": spec.moe.experts,
        "num_experts_per_tok": spec.moe.top_k,
        "intermediate_size": spec.moe.hidden_dim,
    }


def _qwen3_moe(fields: Fields, family: str) -> ModelSpec:
    fields.only("mlp_only_layers", [])
    fields.only("decoder_sparse_step", 1)
    normalised = fields.get("norm_topk_prob", False)
    moe = _experts(fields, "moe_intermediate_size", normalised=normalised)
    slides = fields.get("use_sliding_window", False)
    if slides:  # all layers then, unlike in the dense models
        fields.ignored("max_window_layers")
        window = fields["sliding_window"]
        return qwen(fields, family, moe=moe, windows=(window,) * fields["num_hidden_layers"])
    return qwen(fields, family, moe=moe)


def _qwen3_moe_fields(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    values = qwen_fields(spec)
    del values["layer_types"]
    return values | {
        "num_experts": spec.moe.experts,
        "num_experts_per_tok": spec.moe.top_k,
        "moe_intermediate_size": spec.moe.hidden_dim,
        "norm_topk_prob": spec.moe.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gpt_oss(fields: Fields, family: str) -> ModelSpec:
    layers, window = fields["num_hidden_layers"], fields["sliding_window"]
    fields.only("hidden_act", "silu")
    fields.only("swiglu_alpha", 1.702)  # quick_gelu's
    moe = _experts(fields, "intermediate_size", normalised=True)
    fields.same("experts_per_token", moe.top_k)
    mlp = MLPSpec(
        fields["intermediate_size"], "quick_gelu", gated=True, bias=False,
        clip=float(fields.get("swiglu_limit", 7.0)), up_offset=1.0,
    )  # fmt: skip
    spec = llama_like(
        fields,
        family,
        rotary={"base": None},
        mlp=mlp,
        windows=by_type(fields, window) or every(layers, 2, window),
        sinks=True,
        moe=dataclasses.replace(moe, bias=True),
    )
    scaling = spec.encoding.scaling if isinstance(spec.encoding, rope.Rotary) else None
    if isinstance(scaling, rope.YaRN):
        fields.same("initial_context_length", scaling.trained_length)
    return spec


def _gpt_oss_fields(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    return llama_fields(spec) | window_fields(spec) | {
        "hidden_act": "silu",
        "swiglu_limit": spec.mlp.clip,
        "num_local_experts": spec.moe.experts,
        "num_experts_per_tok": spec.moe.top_k,
    }  # fmt: skip


def _expert_rows(block: str, gate: str, up: str, down: str) -> list:
    layer = f"model.layers.{{}}.{block}"
    return [
        row(f"{layer}.gate.weight", "layers/moe/router", "e d -> d e"),
        row(f"{layer}.experts.{{e}}.{gate}.weight", "layers/moe/gate", "m d -> d m"),
        row(f"{layer}.experts.{{e}}.{up}.weight", "layers/moe/up", "m d -> d m"),
        row(f"{layer}.experts.{{e}}.{down}.weight", "layers/moe/down", "d m -> m d"),
    ]


_GPT_OSS = [
    row("model.layers.{}.self_attn.sinks", "layers/attention/sinks", "n"),
    row("model.layers.{}.mlp.router.weight", "layers/moe/router", "e d -> d e"),
    row("model.layers.{}.mlp.router.bias", "layers/moe/b_router", "e"),
    row(
        "model.layers.{}.mlp.experts.gate_up_proj",
        "layers/moe/{gate,up}",
        "e d (m two) -> two e d m",
    ),
    row(
        "model.layers.{}.mlp.experts.gate_up_proj_bias",
        "layers/moe/{b_gate,b_up}",
        "e (m two) -> two e m",
    ),
    row("model.layers.{}.mlp.experts.down_proj", "layers/moe/down", "e m d"),
    row("model.layers.{}.mlp.experts.down_proj_bias", "layers/moe/b_down", "e d"),
]
_AROUND = [*ENDS, *ATTENTION, *PRE_NORMS]
FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM", _mixtral, _mixtral_fields,
        [*_AROUND, *_expert_rows("block_sparse_moe", "w1", "w3", "w2")],
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_fields,
        [*_AROUND, *_expert_rows("mlp", "gate_proj", "up_proj", "down_proj")],
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", _gpt_oss, _gpt_oss_fields, [*_AROUND, *_GPT_OSS]
    ),
}  # fmt: skip
