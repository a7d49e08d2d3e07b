"""What llama.cpp's architectures are: the facts of a GGUF file that differ from Llama's.

llama.cpp writes many of them into its own code instead of the file: how often a layer sees
everything, which layers carry no positions. They are repeated here.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lminf.attention.rope import (
    Alibi,
    Encoding,
    Learnt,
    NoEncoding,
    QueryGain,
    Rotary,
    Unscaled,
    YaRN,
)
from lminf.checkpoints.config_fields import Activation, Fields
from lminf.checkpoints.families.family import differing, every
from lminf.checkpoints.gguf_file import GGUFFile
from lminf.models.spec import MLPSpec, MoESpec


@dataclass(frozen=True)
class Known:
    """What has been read of a file before an architecture's own facts."""

    facts: Fields
    file: GGUFFile
    layers: int
    width: int
    heads: int
    head_dim: int
    encoding: Rotary | None  # None where the architecture rotates nothing

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors


SpecFields = Callable[[Known], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """An entry of the table: whose models it holds, and how they differ from Llama."""

    family: str
    activation: Activation = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    scale_offset: float = 0.0
    layout: Literal["half", "interleaved"] | None = "half"  # of the rotation; None: no rotation
    gated: bool = True
    grouped: bool = True  # it may have fewer key heads than query heads
    also: tuple[str, ...] = ()  # families that `spec_fields` finds in the facts of some files
    spec_fields: SpecFields = lambda known: {}  # fields of the ModelSpec that are not Llama's


def _local(known: Known, pattern: int, *, required: bool = True) -> tuple[int | None, ...]:
    """Windows of layers of which each `pattern`-th sees everything."""
    known.facts.only("attention.sliding_window_pattern", pattern)
    name = "attention.sliding_window"
    window = known.facts[name] if required else known.facts.get(name)
    return every(known.layers, pattern, window)


def _own_encodings(known: Known, sliding: Encoding, windows: tuple[int | None, ...]) -> tuple:
    """Of layers that see everything as the file says, of the others `sliding`."""
    assert known.encoding is not None
    by_layer = tuple(known.encoding if width is None else sliding for width in windows)
    return differing(known.encoding, by_layer)


def _experts(known: Known, hidden: str, *, count: str = "expert_count") -> MoESpec:
    facts = known.facts
    facts.only("expert_weights_norm", True)
    facts.only("expert_gating_func", 1)  # softmax
    return MoESpec(
        experts=facts[count],
        top_k=facts["expert_used_count"],
        hidden_dim=facts.get(hidden, facts["feed_forward_length"]),
        shared_dim=0,
        dense_layers=0,
        normalised=True,  # llama.cpp divides the weights by their sum for these architectures
        capacity_factor=None,
    )


def _llama(known: Known) -> dict[str, Any]:
    if known.facts.get("expert_count") is None:
        return {}
    return {"family": "mixtral", "moe": _experts(known, "expert_feed_forward_length")}


def _mistral3(known: Known) -> dict[str, Any]:
    """Ministral 3. llama.cpp takes the length from YaRN's."""
    beta, facts = known.facts.get("attention.temperature_scale", 0.0), known.facts
    length = facts.get("rope.scaling.original_context_length", facts["context_length"])
    facts.same("attention.temperature_length", length)
    return {"query_gain": QueryGain(float(beta), length) if beta else None}


def _qwen3moe(known: Known) -> dict[str, Any]:
    return {"qk_norm": "head", "moe": _experts(known, "expert_feed_forward_length")}


def _granite(known: Known) -> dict[str, Any]:
    facts = known.facts
    return {
        "query_scale": facts["attention.scale"],
        "embed_scale": facts.get("embedding_scale", 1.0),
        "residual_scale": facts.get("residual_scale", 1.0),
        "logit_scale": 1 / facts.get("logit_scale", 1.0),
    }


def _smollm3(known: Known) -> dict[str, Any]:
    encodings = (NoEncoding() if (layer + 1) % 4 == 0 else None for layer in range(known.layers))
    return {"layer_encodings": tuple(encodings) if known.layers >= 4 else ()}


def _gemma(known: Known) -> dict[str, Any]:
    return {"embed_scale": known.width**0.5}


def _sandwiched(known: Known, largest: int) -> dict[str, Any]:
    """Gemma 2 and 3, whose largest model, of so many layers, scales by its width over its heads;
    the file does not say so.
    """
    divisor = known.width // known.heads if known.layers == largest else known.head_dim
    return _gemma(known) | {"post_norms": True, "query_scale": divisor**-0.5}


def _gemma2(known: Known) -> dict[str, Any]:
    return _sandwiched(known, 46) | {
        "windows": _local(known, 2),
        "attention_soft_cap": known.facts["attn_logit_softcapping"],
        "final_soft_cap": known.facts["final_logit_softcapping"],
    }


def _gemma3(known: Known) -> dict[str, Any]:
    windows = _local(known, 6, required=False)
    sliding = Rotary(float(known.facts.get("rope.freq_base_swa", 10000.0)), known.head_dim)
    return _sandwiched(known, 62) | {
        "windows": windows,
        "layer_encodings": _own_encodings(known, sliding, windows),
        "qk_norm": "head",
        "final_soft_cap": known.facts.get("final_logit_softcapping"),
    }


def _olmo2(known: Known) -> dict[str, Any]:
    norms: dict[str, Any] = {"qk_norm": "all", "pre_norms": False, "post_norms": True}
    windows = _local(known, 4, required=False)
    if set(windows) == {None}:
        return norms
    assert known.encoding is not None
    # Layers with a window are not scaled.
    sliding = Rotary(known.encoding.base, known.encoding.dim, "half", Unscaled())
    own_encodings = _own_encodings(known, sliding, windows)
    return norms | {"family": "olmo3", "windows": windows, "layer_encodings": own_encodings}


def _phi3(known: Known) -> dict[str, Any]:
    return {"windows": (known.facts.get("attention.sliding_window"),) * known.layers}


def _stablelm(known: Known) -> dict[str, Any]:
    shared = known.facts.get("use_parallel_residual", False)
    head_norms = known.has("blk.0.attn_q_norm.weight")
    return {
        "residual": "parallel_shared" if shared else "sequential",
        "qk_norm": "each_head" if head_norms else None,
    }


def _cohere(known: Known) -> dict[str, Any]:
    head_norms = known.has("blk.0.attn_q_norm.weight")
    return {
        "residual": "parallel_shared",
        "qk_norm": "each_head" if head_norms else None,
        "logit_scale": float(known.facts.stated("logit_scale") or 1),
    }


def _cohere2(known: Known) -> dict[str, Any]:
    windows = _local(known, 4)
    encodings = tuple(NoEncoding() if width is None else None for width in windows)
    return _cohere(known) | {
        "windows": windows,
        "layer_encodings": encodings if None in windows else (),
    }


def _gpt_oss(known: Known) -> dict[str, Any]:
    assert known.encoding is not None
    encoding, facts = known.encoding, known.facts
    if isinstance(encoding.scaling, YaRN):  # the model's own ramp is not rounded to channels
        scaling = dataclasses.replace(encoding.scaling, truncate=False)
        encoding = dataclasses.replace(encoding, scaling=scaling)
    hidden_dim = facts.get("feed_forward_length", facts["expert_feed_forward_length"])
    return {
        "encoding": encoding,
        "windows": _local(known, 2),
        "sinks": True,
        "mlp": MLPSpec(hidden_dim, "quick_gelu", gated=True, bias=False, clip=7.0, up_offset=1.0),
        "moe": dataclasses.replace(_experts(known, "expert_feed_forward_length"), bias=True),
    }


def _gptneox(known: Known) -> dict[str, Any]:
    parallel = known.facts["use_parallel_residual"]
    return {"residual": "parallel" if parallel else "sequential"}


def _gpt2(known: Known) -> dict[str, Any]:
    return {"encoding": Learnt(known.file.tensors["position_embd.weight"].shape[0], 0)}


def _mpt(known: Known) -> dict[str, Any]:
    return {
        "encoding": Alibi(known.facts["attention.max_alibi_bias"]),
        "qkv_clip": known.facts.get("attention.clamp_kqv"),
    }


def _bloom(known: Known) -> dict[str, Any]:
    return {"encoding": Alibi(8.0), "embed_norm": True}


def _falcon(known: Known) -> dict[str, Any]:
    two = known.has("blk.0.attn_norm_2.weight")
    return {"residual": "parallel" if two else "parallel_shared"}


_LAYER: dict[str, Any] = {"norm": "layer", "norm_bias": True}
_OLD: dict[str, Any] = _LAYER | {"gated": False, "grouped": False}
_GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "scale_offset": 1.0}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", also=("mistral", "mixtral"), spec_fields=_llama),
    "mistral3": Architecture("ministral3", spec_fields=_mistral3),
    "granite": Architecture("granite", spec_fields=_granite),
    "smollm3": Architecture("smollm3", spec_fields=_smollm3),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", spec_fields=lambda known: {"qk_norm": "head"}),
    "qwen3moe": Architecture("qwen3_moe", spec_fields=_qwen3moe),
    "gemma": Architecture("gemma", spec_fields=_gemma, **_GEMMA),
    "gemma2": Architecture("gemma2", spec_fields=_gemma2, **_GEMMA),
    "gemma3": Architecture("gemma3_text", spec_fields=_gemma3, **_GEMMA),
    "olmo2": Architecture("olmo2", also=("olmo3",), spec_fields=_olmo2),
    "phi3": Architecture("phi3", spec_fields=_phi3),
    "glm4": Architecture(
        "glm4", layout="interleaved", spec_fields=lambda known: {"post_norms": True}
    ),
    "stablelm": Architecture("stablelm", spec_fields=_stablelm, **_LAYER),
    "command-r": Architecture("cohere", norm="layer", layout="interleaved", spec_fields=_cohere),
    "cohere2": Architecture("cohere2", norm="layer", layout="interleaved", spec_fields=_cohere2),
    "gpt-oss": Architecture("gpt_oss", spec_fields=_gpt_oss),
    "gptneox": Architecture("gpt_neox", "gelu", spec_fields=_gptneox, **_OLD),
    "gpt2": Architecture("gpt2", "gelu_tanh", layout=None, spec_fields=_gpt2, **_OLD),
    "mpt": Architecture(
        "mpt", "gelu", "layer", layout=None, gated=False, grouped=False, spec_fields=_mpt
    ),
    "bloom": Architecture("bloom", "gelu_tanh", layout=None, spec_fields=_bloom, **_OLD),
    "falcon": Architecture("falcon", "gelu", gated=False, spec_fields=_falcon, **_LAYER),
}
