"""config.json <-> ModelSpec, by the functions of a family (lminf.checkpoints.families).

Every field of a config.json is either read there, or listed as known not to change what the model
computes, or refused by name; a value that asks for mathematics we do not have is refused too. A
field that is null is as good as absent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lminf.checkpoints.config_fields import Fields
from lminf.checkpoints.families import FAMILIES
from lminf.checkpoints.hf_fields import MEANINGLESS, SHAPE
from lminf.config import closest
from lminf.errors import InputError
from lminf.models.spec import ModelSpec

# Types that no entry of the table could be for.
UNLIKE = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "glm4_moe_lite"),
        "its attention (MLA) stores one vector a token, of which the keys and values of all heads "
        "are made, where caches and policies here hold keys by head",
    ),
    **dict.fromkeys(
        ("mamba", "mamba2", "jamba", "falcon_mamba", "rwkv", "recurrent_gemma", "qwen3_next"),
        "its recurrent layers keep a state instead of keys",
    ),
    **dict.fromkeys(
        ("mllama", "qwen2_vl", "qwen2_5_vl", "llama4"),
        "it reads images too; give its text model: a folder of its own, or a GGUF file",
    ),
}

# Models of texts and images whose text model is in a section of its own, and the values of
# Gemma3TextConfig (transformers), which published sections leave out.
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "mistral3": {},
    "gemma3": {
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072, "num_attention_heads": 8, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "vocab_size": 262_208,
    },
}  # fmt: skip
# Where the section has no rope_parameters, which files of transformers 5 have instead.
GEMMA3_BASES = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}


def to_spec(values: Mapping[str, Any], source: str) -> ModelSpec:
    """The spec of a config.json; `source` names the file in errors."""
    values = _text_model(values, source)
    stored = values.get("quantization_config")
    mxfp4 = isinstance(stored, Mapping) and stored.get("quant_method") == "mxfp4"
    if mxfp4 and values.get("model_type") == "gpt_oss":
        values = {name: value for name, value in values.items() if name != "quantization_config"}
    elif stored is not None:
        raise InputError(
            f"{source} describes quantised weights (quantization_config), which are not read from "
            f"safetensors; give the folder of the original weights, or a GGUF file of this model, "
            f"whose quantised types are read"
        )
    fields = Fields(values, source, SHAPE, MEANINGLESS)
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{source} describes a model of the type {family!r}, {_unknown(family)}")
    try:
        spec = FAMILIES[family].to_spec(fields, family)
    except InputError as error:  # of a value that is allowed by itself but not beside the others
        if str(error).startswith(source):
            raise
        raise InputError(f"{source} describes no model that can be: {error}") from error
    fields.refuse_others()
    return spec


def _text_model(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The values of the text model alone."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in WITH_IMAGES:
        return values
    section = values.get("text_config")
    if not isinstance(section, Mapping):
        raise InputError(
            f"{source} has no text_config, the section of the text model; fetch the file again"
        )
    left_out = WITH_IMAGES[family]
    if family == "gemma3" and "rope_parameters" not in section:
        left_out = left_out | GEMMA3_BASES
    # A head is tied, or the weights quantised, as the whole model's part of the file says.
    names = ("tie_word_embeddings", "quantization_config")
    return {**left_out, **section} | {name: values[name] for name in names if name in values}


def _unknown(family: Any) -> str:
    """Why a type is not read, and what to do."""
    if family in UNLIKE:
        return f"which is not read: {UNLIKE[family]}"
    return (
        f"which is not read; {closest(str(family), FAMILIES)}; docs/adding_a_model.md shows how to "
        f"add one in lminf/checkpoints/families"
    )


def from_spec(spec: ModelSpec) -> dict[str, Any]:
    """A config.json, as transformers reads it, that describes exactly this spec."""
    if spec.family not in FAMILIES:
        raise InputError(
            f"there is no Hugging Face format for the family {spec.family!r}; families that have "
            f"one are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[spec.family]
    values = {"model_type": spec.family, "architectures": [family.model_class]}
    values |= family.to_fields(spec)
    again = to_spec(values, "the exported config.json")
    for field in dataclasses.fields(spec):
        if getattr(spec, field.name) != getattr(again, field.name):
            raise InputError(
                f"a {spec.family} checkpoint cannot say {field.name} = "
                f"{str(getattr(spec, field.name))[:80]} (only "
                f"{str(getattr(again, field.name))[:80]}); save it in the native format"
            )
    return values
