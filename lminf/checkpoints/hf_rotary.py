"""Rotary encodings of a config.json: `rope_parameters`, or `rope_theta` with `rope_scaling`.

transformers 5 writes the former, everything before it the latter. We read both and write the
latter, which every version reads.
"""

from typing import Any

from lminf.attention import rope
from lminf.checkpoints.fields import Fields
from lminf.errors import InputError


def read(fields: Fields, head_dim: int) -> rope.Rotary:
    """The encoding, from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    given = Fields(new or old or {}, fields.source, "rope_parameters." if new else "rope_scaling.")
    neox = fields.values.get("model_type") == "gpt_neox"
    theta, part = (
        ("rotary_emb_base", "rotary_pct") if neox else ("rope_theta", "partial_rotary_factor")
    )
    # Files older than these fields mean the values of the original Llama and GPT-NeoX.
    base = given.get("rope_theta", fields.get(theta, 10000.0))
    share = given.get("partial_rotary_factor", fields.get(part, 0.25 if neox else 1.0))
    dim = int(head_dim * share)
    scaling = _scaling(given, fields)
    given.refuse_others(frozenset({"finetuned", "rope_type", "type"}))
    return rope.Rotary(float(base), dim, "half", scaling)


def _scaling(given: Fields, fields: Fields) -> rope.Scaling:
    kind = given.get("rope_type", given.get("type", "default"))
    longest = fields["max_position_embeddings"]
    if kind == "default":
        return rope.Unscaled()
    if kind == "linear":
        return rope.Linear(float(given["factor"]))
    if kind == "dynamic":
        given.only("original_max_position_embeddings", longest)
        return rope.DynamicNTK(float(given["factor"]), longest)
    trained = given.get("original_max_position_embeddings", longest)
    if kind == "llama3":
        return rope.Llama3(
            float(given["factor"]),
            float(given["low_freq_factor"]),
            float(given["high_freq_factor"]),
            trained,
        )
    if kind == "yarn":
        return rope.YaRN(
            float(given.get("factor", longest / trained)),
            trained,
            float(given.get("beta_fast", 32.0)),
            float(given.get("beta_slow", 1.0)),
            _yarn_temperature(given, longest / trained),
            given.get("truncate", True),
        )
    raise InputError(
        f"{fields.source} scales its rotary angles by {kind!r}; default, linear, dynamic, yarn and "
        f"llama3 are read"
    )


def _yarn_temperature(given: Fields, stretch: float) -> float | None:
    """The temperature where the file says one, itself or through DeepSeek's pair of factors."""
    stated, top, bottom = (
        given.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if stated is not None or not (top and bottom):
        return None if stated is None else float(stated)
    factor = float(given.get("factor", stretch))
    lengthened = rope.YaRN(factor, 1).temperature - 1.0  # 0.1 ln(factor)
    return (1 + top * lengthened) / (1 + bottom * lengthened)


def write(encoding: rope.Encoding) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    if not isinstance(encoding, rope.Rotary):
        return {}
    scaling = encoding.scaling
    fields: dict[str, Any] = {"rope_theta": encoding.base}
    match scaling:
        case rope.Linear(factor):
            fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case rope.DynamicNTK(alpha):
            fields["rope_scaling"] = {"rope_type": "dynamic", "factor": alpha}
        case rope.Llama3(factor, low, high, trained):
            fields["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
        case rope.YaRN(factor, trained, fast, slow, temperature, truncate):
            fields["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": trained,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
            } | ({} if temperature is None else {"attention_factor": temperature})
    return fields
