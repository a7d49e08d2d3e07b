"""How every figure of the repository looks: one style, one colour for a policy, readable numbers.

`look` answers for a line of a figure by its name. A policy has the same name, colour and marker
wherever it is drawn, in reports and in notebooks; other lines take the palette in turn.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

# Okabe and Ito's palette without its yellow, which is hard to see as a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # of lines that share a colour
MARKERS = "osD^vPX"
DPI = 160  # about twice the width of a page on GitHub, so that text stays sharp
STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 10,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 100,
    "savefig.dpi": DPI,
    "svg.fonttype": "none",  # text stays text: it can be searched, and files are small
    "svg.hashsalt": "lminf",  # the same figure gives the same bytes
    "image.composite_image": False,
}


class Look(NamedTuple):
    """How one line is named and drawn."""

    label: str
    colour: str
    marker: str = "o"
    family: str = ""  # lines of one family share a panel where there are too many for one


RECENT, REMAPPED = "First and recent tokens", "All tokens, nearer positions"
SELECTED, EVICTED = "Tokens selected by content", "Tokens evicted by a score"
COMPRESSED = "Compressed prompts"

# No colour serves two policies: a reader who has seen one figure can read the next.
POLICIES = {
    "full": Look("Full", "#000000", "o"),
    "per_layer": Look("Mixed by layer", "#5B5B5B", "P"),
    "per_head": Look("Mixed by head", "#B0B0B0", "X"),
    "re-read": Look("Re-reading", "#8C8C8C", "o"),
    "window": Look("Window", "#E69F00", "s", RECENT),
    "lambda": Look("Lambda", "#999933", "D", RECENT),
    "lm_infinite": Look("LM-Infinite", "#0072B2", "o", RECENT),
    "streaming": Look("StreamingLLM", "#D55E00", "s", RECENT),
    "rerope": Look("ReRoPE", "#009E73", "^", REMAPPED),
    "leaky_rerope": Look("Leaky ReRoPE", "#CC79A7", "v", REMAPPED),
    "self_extend": Look("SelfExtend", "#56B4E9", "D", REMAPPED),
    "topk": Look("Top-k", "#117733", "^", SELECTED),
    "infllm": Look("InfLLM", "#AA4499", "D", SELECTED),
    "longheads": Look("LongHeads", "#44AA99", "P", SELECTED),
    "hip": Look("HiP", "#B8860B", "X", SELECTED),
    "infinite_hip": Look("InfiniteHiP", "#882255", "v", SELECTED),
    "moba": Look("MoBA", "#661100", "*", SELECTED),
    "segments": Look("Segments", "#7F4F24", "s", SELECTED),
    "h2o": Look("H2O", "#E0607E", "v", EVICTED),
    "tova": Look("TOVA", "#4D9221", "^", EVICTED),
    "sirllm": Look("SirLLM", "#6A3D9A", "D", EVICTED),
    "snapkv": Look("SnapKV", "#332288", "P", COMPRESSED),
    "think": Look("ThinK", "#A50026", "X", COMPRESSED),
}
BY_LABEL = {look.label.lower(): name for name, look in POLICIES.items()}
# `snapkv:window=8`, `snapkv asked by 8`, `LM-Infinite`: the policy, then what is said of it.
NAMED = re.compile(r"([\w-]+)(.*)", re.DOTALL)


def policy_of(name: str) -> tuple[str, str] | None:
    """(policy, what else the name says) of a line's name; None: it is no policy's."""
    match = NAMED.fullmatch(name)
    kind = match and BY_LABEL.get(match[1].lower(), match[1])
    return (kind, match[2]) if match and kind in POLICIES else None


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each line of one figure. Policies keep theirs; the rest take turns."""
    chosen, unnamed = {}, 0
    labels = short_names(dict.fromkeys(names))
    for name, label in labels.items():
        policy = policy_of(name)
        if policy:
            chosen[name] = POLICIES[policy[0]]._replace(label=label)
        else:
            colour, marker = PALETTE[unnamed % len(PALETTE)], MARKERS[unnamed % len(MARKERS)]
            chosen[name] = Look(label, colour, marker)
            unnamed += 1
    return chosen


def short_names(values: Iterable[str]) -> dict[str, str]:
    """`kind:field=value,…` -> its kind, with the settings that tell it from others of its kind.

    Policies are called as their papers call them.
    """
    values = list(values)
    parts = {value: _parts(value) for value in values}
    short = {}
    for value, (kind, settings) in parts.items():
        siblings = [set(s) for v, (k, s) in parts.items() if k == kind and v != value]
        shared = set.intersection(*siblings) if siblings else set(settings)
        distinct = [setting for setting in settings if setting not in shared]
        ending = [", ".join(distinct).replace("=", " ")] if distinct else []
        short[value] = "\n".join([kind, *ending])
    return short


def _parts(name: str) -> tuple[str, list[str]]:
    """(label of the kind, settings) of a name."""
    policy = policy_of(name)
    kind, rest = policy or ("", "")
    if policy:
        label = POLICIES[kind].label
        return (label, rest[1:].split(",")) if rest[:1] in (":", "\n") else (label + rest, [])
    kind, colon, settings = name.partition(":")
    return (kind, settings.split(",")) if colon and "=" in settings else (name, [])


# --- numbers --------------------------------------------------------------------------------------

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def length(value: float) -> str:
    """`8k` of 8,192 and `4M` of 4,194,304: lengths are powers of two, so k is 1,024."""
    for size, suffix in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0 and value < size * 2**10:
            return f"{value / size:,.0f}{suffix}"
    return number(value)


def number(value: float) -> str:
    """`2,500`, `0.004`, `3B`, `10²¹`, `2×10¹⁷`: a decimal number as short as it can be read."""
    size = abs(value)
    if size == 0 or 1e-4 <= size < 1e6:
        return f"{value:,.6g}" if size < 1000 else f"{value:,.10g}"
    for unit, suffix in ((1e9, "B"), (1e6, "M")):
        if unit <= size < 1000 * unit:
            return f"{value / unit:.4g}{suffix}"
    return power(value)


def short(value: float) -> str:
    """`number` of three digits: `268M`."""
    return number(float(f"{value:.3g}"))


def power(value: float) -> str:
    """`10²¹`, `2×10¹¹`: FLOPs, which have no letters that everybody knows."""
    exponent = math.floor(math.log10(abs(value)))
    factor = f"{value / 10.0**exponent:.3g}"
    if factor == "10":
        factor, exponent = "1", exponent + 1
    ten = f"10{str(exponent).translate(SUPERSCRIPTS)}"
    return ten if factor == "1" else f"{factor}×{ten}"
