"""GGUF checkpoints: metadata -> ModelSpec, tensors -> parameter tree, vocabulary -> tokenizer."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from lminf.attention.rope import (
    Base,
    Factor,
    Length,
    Linear,
    Llama3,
    LongRoPE,
    Rotary,
    Scaling,
    Temperature,
    Unscaled,
    YaRN,
)  # fmt: skip
from lminf.checkpoints import gguf_tokenizer, gguf_weights, tensors
from lminf.checkpoints.config_fields import Fields, Meaningless
from lminf.checkpoints.gguf_architectures import ARCHITECTURES, Known
from lminf.checkpoints.gguf_file import GGUFFile, open_gguf
from lminf.config import closest
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.models.spec import (
    Cap,
    Epsilon,
    Layers,
    MLPSpec,
    ModelSpec,
    Multiplier,
    NormSpec,
    Size,
)
from lminf.ranges import Range, shown

COMMON_SHAPE: dict[str, Any] = {"general.architecture": str}
# What each key of an architecture may be, without the architecture's name.
SHAPE: dict[str, Any] = {
    "block_count": Layers,
    "context_length": Length,
    "embedding_length": Size,
    "feed_forward_length": Size,
    "use_parallel_residual": bool,
    "attn_logit_softcapping": Cap,
    "final_logit_softcapping": Cap,
    "attention.head_count": Size,
    "attention.head_count_kv": Size,
    "attention.key_length": Size,
    "attention.value_length": Size,
    "attention.sliding_window": Length,
    "attention.layer_norm_epsilon": Epsilon,
    "attention.layer_norm_rms_epsilon": Epsilon,
    "rope.dimension_count": Size,
    "rope.freq_base": Base,
    "rope.freq_base_swa": Base,
    "attention.scale": Multiplier,
    "attention.temperature_scale": Annotated[float, Range(min=0, max=1e3)],
    "attention.max_alibi_bias": Annotated[float, Range(above=0, max=1e3)],
    "attention.clamp_kqv": Cap,
    "embedding_scale": Multiplier,
    "residual_scale": Multiplier,
    "logit_scale": Multiplier,
    "expert_count": Size,
    "expert_used_count": Size,
    "expert_feed_forward_length": Size,
    "rope.scale_linear": Factor,
    "rope.scaling.factor": Factor,
    "rope.scaling.type": str,
    "rope.scaling.original_context_length": Length,
    "rope.scaling.attn_factor": Temperature,
    "rope.scaling.yarn_beta_fast": Factor,
    "rope.scaling.yarn_beta_slow": Factor,
    "rope.scaling.yarn_log_multiplier": Annotated[float, Range(min=0, max=1e3)],
}
# Keys that change nothing in what the model computes, and at which values: sizes said again, parts
# of other architectures that this file does without. All others are used, or refused by name.
MEANINGLESS: Meaningless = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scale_linear": (0.0,),
    "rope.scaling.factor": (0.0,),
    "rope.scaling.finetuned": None,  # whether training went on with the scaling
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),  # llama.cpp's default of the scaling type
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "pooling_type": (0,),
    "logit_scale": (0.0, 1.0),  # llama.cpp scales by none of these where it is 0
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "swin_norm": (False,),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0,),
    "moe_every_n_layers": (0,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_weights_norm": (False,),
    "expert_gating_func": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
}
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's schedule divides each frequency by
# The two lists of LongRoPE.
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
ALL_FACTORS = {ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS}
PARTLY_ROTATED = {"gptneox.", "phi3.", "glm4.", "stablelm."}
# The schedules of the released models; the file holds only the factors that follow from them.
LLAMA3_SCHEDULES = tuple(Llama3(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))


def load(
    path: Path, *, dtype: Any = np.float32, progress: tensors.Progress | None = None
) -> tuple[ModelSpec, dict[str, Any], Tokenizer]:
    """Spec, parameters (numpy, of `dtype`) and tokenizer of a GGUF file."""
    file = open_gguf(path)
    spec = read_spec(file)
    tokenizer = gguf_tokenizer.from_metadata(file.metadata, str(path))
    params = tensors.read(
        spec,
        gguf_weights.rows_of(file.metadata["general.architecture"], spec.residual),
        shapes={name: t.shape for name, t in file.tensors.items() if name not in ALL_FACTORS},
        tensor=file.read,
        dtype=dtype,
        source=str(path),
        progress=progress,
    )
    return spec, params, tokenizer


def read_spec(file: GGUFFile) -> ModelSpec:
    """Every fact of the model; what is not understood is refused by name.

    Keys outside the architecture's own and the tokenizer's are notes that others left in the file.
    """
    common = Fields(file.metadata, str(file.path), COMMON_SHAPE, {})
    name = common.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path} holds a model of the architecture {name!r}, which is not read; "
            f"{closest(str(name), ARCHITECTURES)}; docs/adding_a_model.md shows how to add one"
        )
    common.only("general.type", "model")
    common.only("general.quantization_version", 2)  # the blocks of before are laid out otherwise
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(
            f"{file.path} has no token_embd.weight with a row for each token; fetch the file "
            f"again, whole"
        )
    prefix = f"{name}."
    architecture = ARCHITECTURES[name]
    facts = Fields(
        {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)},
        str(file.path),
        SHAPE,
        MEANINGLESS,
        prefix,
    )
    width, layers, heads = (
        facts[name] for name in ("embedding_length", "block_count", "attention.head_count")
    )
    kv_heads = facts.get("attention.head_count_kv", heads)
    head_dim = facts.get("attention.key_length", width // heads)
    values = facts.get("attention.value_length", head_dim)
    grouped = heads % kv_heads == 0 and (architecture.grouped or kv_heads == heads)
    if not grouped or not values == head_dim > 0 or layers > len(file.tensors):
        raise InputError(
            f"{file.path} has {heads} query and {kv_heads} key heads, keys of {head_dim} and "
            f"values of {values} channels, and {len(file.tensors)} tensors for {layers} layers; no "
            f"model of a known kind is like that"
        )
    layer_norm = architecture.norm == "layer"
    epsilon = facts[f"attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"]
    encoding = None
    if architecture.layout is not None:
        encoding = _encoding(facts, file, head_dim, architecture.layout)
    known = Known(facts, file, layers, width, heads, head_dim, encoding)
    spec: dict[str, Any] = {
        "family": architecture.family,
        "vocab_size": embedding.shape[0],
        "width": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp": MLPSpec(
            facts["feed_forward_length"],
            architecture.activation,
            gated=architecture.gated,
            bias=known.has("blk.0.ffn_up.bias"),
        ),
        "norm": NormSpec(
            architecture.norm, epsilon, architecture.norm_bias, architecture.scale_offset
        ),
        "encoding": encoding,
        "trained_length": facts["context_length"],
        "windows": (None,) * layers,
        "residual": "sequential",
        "qkv_bias": known.has("blk.0.attn_q.bias") or known.has("blk.0.attn_qkv.bias"),
        "out_bias": known.has("blk.0.attn_output.bias"),
        "qk_norm": None,
        "post_norms": False,
        "query_scale": head_dim**-0.5,
        "qkv_clip": None,
        "attention_soft_cap": None,
        "final_soft_cap": None,
        "embed_scale": 1.0,
        "tied": not known.has("output.weight"),
        "head_bias": False,
    }
    architecture_fields = architecture.spec_fields(known)
    if "residual" not in architecture_fields:
        facts.only("use_parallel_residual", False)
    facts.refuse_others()
    return ModelSpec(**(spec | architecture_fields))


def _encoding(
    facts: Fields, file: GGUFFile, head_dim: int, layout: Literal["half", "interleaved"]
) -> Rotary:
    # The format's own default: files without this key are older than the key.
    base = float(facts.get("rope.freq_base", 10000.0))
    # Only part of the channels are rotated in some architectures, whose files must say how many.
    partial = facts.prefix in PARTLY_ROTATED
    dim = facts["rope.dimension_count"] if partial else facts.get("rope.dimension_count", head_dim)
    if dim % 2 or dim > head_dim:
        raise InputError(
            f"{file.path} rotates {dim} of {head_dim} channels; the file is damaged, fetch it again"
        )
    return Rotary(base, dim, layout, _scaling(facts, file, base, dim))


def _scaling(facts: Fields, file: GGUFFile, base: float, dim: int) -> Scaling:
    """The schedule, as llama.cpp reads it: linear where a factor stands without a type."""
    if SHORT_FACTORS in file.tensors:
        return _longrope(facts, file)
    kind = facts.get("rope.scaling.type", "linear")
    factor = facts.get("rope.scaling.factor", facts.get("rope.scale_linear", 1.0))
    facts.ignored("rope.scale_linear")  # the older name, which the newer one overrules
    trained = facts.get("rope.scaling.original_context_length", facts["context_length"])
    fast = facts.get("rope.scaling.yarn_beta_fast", 32.0)
    slow = facts.get("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "yarn":
        facts.only("rope.scaling.yarn_ext_factor", 1.0)
        usual = YaRN(factor, 1).temperature
        multiplier = facts.get("rope.scaling.attn_factor", 1.0)
        temperature = None if multiplier == 1 else usual * multiplier
        if bottom := facts.get("rope.scaling.yarn_log_multiplier"):  # mscale_all_dim; mscale is 1
            temperature = multiplier * usual / (1 + bottom * (usual - 1))
        scaling = YaRN(factor, trained, fast, slow, temperature)
    elif kind in ("none", "linear"):
        facts.only("rope.scaling.yarn_ext_factor", 0.0)
        facts.only("rope.scaling.attn_factor", 1.0)
        scaling = Unscaled() if kind == "none" or factor == 1 else Linear(factor)
    else:
        raise InputError(
            f"{file.path} scales its rotary angles by {shown(kind)}; none, linear, yarn and "
            f"Llama 3's factors are read"
        )
    if ROPE_FACTORS not in file.tensors:
        return scaling
    if scaling != Unscaled():
        raise InputError(
            f"{file.path} has both {ROPE_FACTORS} and a rotary scaling of the type {kind!r}; use "
            f"the Hugging Face checkpoint of this model"
        )
    return _llama3(file, base, dim)


def _longrope(facts: Fields, file: GGUFFile) -> LongRoPE:
    facts.only("rope.scaling.type", "longrope", "none")
    longest, trained = facts["context_length"], facts["rope.scaling.original_context_length"]
    short, long = (
        tuple(float(str(x)) for x in file.read(name)) for name in (SHORT_FACTORS, LONG_FACTORS)
    )
    schedule = LongRoPE(short, long, trained, longest / trained)
    stated = facts.get("rope.scaling.attn_factor", 1.0)
    if abs(stated - schedule.temperature) < 1e-6:  # as it follows from the lengths
        return schedule
    return dataclasses.replace(schedule, attention_factor=stated)


def _llama3(file: GGUFFile, base: float, dim: int) -> Llama3 | Unscaled:
    """The schedule whose factors the file holds."""
    factors = file.read(ROPE_FACTORS)
    if factors.shape == (dim // 2,) and (factors == 1).all():
        return Unscaled()
    plain = Unscaled().frequencies(base, dim)
    for schedule in LLAMA3_SCHEDULES:
        expected = plain / schedule.frequencies(base, dim)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-3):
            return schedule
    raise InputError(
        f"{file.path} holds rotary factors from {factors.min():.4g} to {factors.max():.4g}, those "
        f"of no released Llama 3 model; use the Hugging Face checkpoint of this model"
    )
