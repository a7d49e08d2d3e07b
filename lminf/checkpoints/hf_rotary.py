"""Rotary encodings of a config.json: `rope_parameters`, or `rope_theta` with `rope_scaling`.

transformers 5 writes the former, everything before it the latter. We read both and write the
latter, which every version reads. Where layers of two types have encodings of their own, the former
holds a section for each.
"""

from typing import Annotated, Any, Literal

from lminf.attention import rope
from lminf.attention.rope import Base, Factor, Length, Temperature
from lminf.checkpoints.config_fields import Fields, Meaningless
from lminf.errors import InputError
from lminf.ranges import Range

Share = Annotated[float, Range(above=0, max=1)]
SHAPE: dict[str, Any] = {  # of the fields beside the others
    "rope_theta": Base,
    "rope_local_base_freq": Base,
    "rotary_emb_base": Base,
    "partial_rotary_factor": Share,
    "rotary_pct": Share,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "original_max_position_embeddings": Length,
}
_SCALING_SHAPE: dict[str, Any] = {
    "rope_theta": Base,
    "partial_rotary_factor": Share,
    "type": str,
    "rope_type": str,
    "factor": Factor,
    "low_freq_factor": Factor,
    "high_freq_factor": Factor,
    "beta_fast": Factor,
    "beta_slow": Factor,
    "short_factor": list[Factor],
    "long_factor": list[Factor],
    "attention_factor": Temperature,
    "attn_factor": Temperature,
    "mscale": Annotated[float, Range(min=0, max=1e3)],
    "mscale_all_dim": Annotated[float, Range(min=0, max=1e3)],
    "original_max_position_embeddings": Length,
    "max_position_embeddings": Length,
    "truncate": bool,
    "llama_4_scaling_beta": Annotated[float, Range(min=0, max=1e3)],
}
_BY_TYPE: dict[str, Any] = {"full_attention": dict, "sliding_attention": dict}
_MEANINGLESS: Meaningless = {"finetuned": None, "attn_factor": (1.0,)}
# GPT-NeoX's own names; the versions between 4.45 and 5 write both.
_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def read(
    fields: Fields,
    head_dim: int,
    *,
    layout: Literal["half", "interleaved"] = "half",
    base: float | None = 10000.0,
    share: float = 1.0,
) -> rope.Rotary:
    """The encoding, from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    `base` and `share` (of the channels, that are rotated) are what a file means that does not say
    them; None: it must.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    section = "rope_parameters" if new else "rope_scaling"
    if new and old:
        fields.same("rope_scaling", new)
    given = fields.part(section, _SCALING_SHAPE, _MEANINGLESS)
    neox = fields.get("model_type") == "gpt_neox"
    theta = _either(given, fields, "rope_theta", neox, base)
    if theta is None:
        theta = fields["rope_theta"]
    rotated = int(head_dim * _either(given, fields, "partial_rotary_factor", neox, share))
    scaling = _scaling(given, fields)
    if fields.get("model_type") == "ministral3":
        for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
            given.ignored(name)  # of query_gain
    given.refuse_others()
    return rope.Rotary(float(theta), rotated, layout, scaling)


def query_gain(fields: Fields) -> rope.QueryGain | None:
    """What queries at late positions are multiplied by, where Ministral 3 says it: beside the
    rotary encoding.
    """
    section = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    given = fields.part(section, _SCALING_SHAPE, _MEANINGLESS)
    beta = float(given["llama_4_scaling_beta"])
    return rope.QueryGain(beta, given["original_max_position_embeddings"]) if beta else None


def read_by_type(fields: Fields, head_dim: int) -> tuple[rope.Rotary, rope.Rotary]:
    """The encodings of layers with full and with sliding attention.

    Older files say one scaling, of the full layers, and the base of the sliding ones only where it
    differs.
    """
    nested = fields.get("rope_parameters")
    if nested is None:
        full = read(fields, head_dim, base=None)
        local = fields.get("rope_local_base_freq", full.base)
        return full, rope.Rotary(float(local), head_dim, "half")
    sections = fields.part("rope_parameters", _BY_TYPE, {})
    encodings = []
    for kind, equal_names in (("full_attention", ("rope_theta",)), ("sliding_attention", ())):
        given = sections.part(kind, _SCALING_SHAPE, _MEANINGLESS)
        theta = given["rope_theta"]
        for name in equal_names:
            fields.same(name, theta)
        if kind == "sliding_attention":
            fields.same("rope_local_base_freq", theta)
        scaling = _scaling(given, fields)
        given.refuse_others()
        encodings.append(rope.Rotary(float(theta), head_dim, "half", scaling))
    sections.refuse_others()
    fields.ignored("rope_scaling")  # of the full layers, written beside for older versions
    full, sliding = encodings
    return full, sliding


def _either(given: Fields, fields: Fields, name: str, neox: bool, absent: float | None) -> Any:
    """A value that stands in the section, or beside it under one of two names."""
    names = (_NEOX_NAMES[name], name) if neox else (name,)
    value = given.get(name)
    for key in names:
        value = fields.get(key) if value is None else value
    for key in names:
        if value is not None:
            fields.same(key, value)
    return absent if value is None else value


def _scaling(given: Fields, fields: Fields) -> rope.Scaling:
    kind = given.get("rope_type", given.get("type", "default"))
    given.ignored("type")  # the older name, which the newer one overrules
    longest = fields["max_position_embeddings"]
    given.same("max_position_embeddings", longest)
    phi = fields.get("model_type") == "phi3"
    if kind == "longrope" or (phi and kind in ("su", "yarn")):  # Phi-3's earlier names of it
        return _longrope(given, fields, longest)
    if phi:
        fields.ignored("original_max_position_embeddings")  # of that schedule
    if kind == "default":
        return rope.Unscaled()
    if kind == "linear":
        return rope.Linear(float(given["factor"]))
    if kind == "dynamic":
        given.ignored("original_max_position_embeddings")  # as transformers does
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
        factor = float(given.get("factor", longest / trained))
        return rope.YaRN(
            factor,
            trained,
            float(given.get("beta_fast", 32.0)),
            float(given.get("beta_slow", 1.0)),
            _yarn_temperature(given, factor),
            given.get("truncate", True),
        )
    raise InputError(
        f"{fields.source} scales its rotary angles by {kind!r}; default, linear, dynamic, yarn, "
        f"longrope and llama3 are read"
    )


def _longrope(given: Fields, fields: Fields, longest: int) -> rope.LongRoPE:
    trained = given.get("original_max_position_embeddings")
    if trained is None:
        trained = fields["original_max_position_embeddings"]
    fields.same("original_max_position_embeddings", trained)
    stated = given.get("attention_factor")
    return rope.LongRoPE(
        tuple(map(float, given["short_factor"])),
        tuple(map(float, given["long_factor"])),
        trained,
        float(given.get("factor", longest / trained)),
        None if stated is None else float(stated),
    )


def _yarn_temperature(given: Fields, factor: float) -> float | None:
    """The temperature where the file says one: itself, through DeepSeek's pair of factors, or as
    what the usual one is multiplied by (`attn_factor`, as vLLM reads it: 0.878 undoes it)."""
    stated, multiplier, top, bottom = (
        given.get(name) for name in ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")
    )
    usual = rope.YaRN(factor, 1).temperature  # 0.1 ln(factor) + 1
    if stated is not None:
        given.only("attn_factor", 1.0)  # two answers to one question
        return float(stated)
    if top and bottom:
        given.only("attn_factor", 1.0)
        return (1 + top * (usual - 1)) / (1 + bottom * (usual - 1))
    return None if multiplier is None else multiplier * usual


def write(encoding: rope.Encoding) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    if not isinstance(encoding, rope.Rotary):
        return {}
    fields: dict[str, Any] = {"rope_theta": encoding.base}
    match encoding.scaling:
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
        case rope.LongRoPE(short, long, trained, factor, temperature):
            fields["original_max_position_embeddings"] = trained
            fields["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": list(short),
                "long_factor": list(long),
                "factor": factor,
                "original_max_position_embeddings": trained,
            } | ({} if temperature is None else {"attention_factor": temperature})
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


def write_with_gain(encoding: rope.Rotary, gain: rope.QueryGain | None) -> dict[str, Any]:
    """Encoding and gain of queries, as `read` and `query_gain` read them, and transformers 5."""
    fields = write(encoding)
    said = {"rope_type": "default", "rope_theta": fields["rope_theta"], "llama_4_scaling_beta": 0.0}
    if gain is not None:
        said["llama_4_scaling_beta"] = gain.beta
        said["original_max_position_embeddings"] = gain.length
    return {"rope_parameters": said | fields.get("rope_scaling", {})}


def write_by_type(full: rope.Encoding, sliding: rope.Encoding) -> dict[str, Any]:
    """Encodings by type of layer, as transformers 4 (one scaling, two bases) and 5 read them."""
    old = {kind: write(one) for kind, one in (("full", full), ("sliding", sliding))}
    local = old["sliding"].get("rope_theta")
    sections = {
        f"{kind}_attention": {"rope_type": "default"}
        | fields.get("rope_scaling", {})
        | {"rope_theta": fields.get("rope_theta")}
        for kind, fields in old.items()
    }
    return old["full"] | {"rope_local_base_freq": local, "rope_parameters": sections}
