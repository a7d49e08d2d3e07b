"""Parameters and training FLOPs that the laws are written in.

N_nv  transformer blocks only (norms ignored)     N_v = V d, counted once even when untied
N     the step law's count: non-embedding          M   FLOPs per token with attention
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lminf.errors import InputError
from lminf.scaling import stored

Count = TypeVar("Count", int, float, np.ndarray)

# Lowest and highest value of a column of a file or a number of a query, and what it is.
Schema = Mapping[str, tuple[float, float, str]]


def schema(name: str) -> Schema:
    """The columns of a table of columns.json; no bound where it has none."""
    return {
        column: (-np.inf if low is None else low, np.inf if high is None else high, unit)
        for column, (low, high, unit) in stored.read("columns.json")[name].items()
    }


RAW = schema("query")  # d: also runs of models of 1e4 parameters
_SWEEP = stored.read("tao2024.json")
# Width d by non-vocabulary parameters, upper bounds inclusive. One table of the paper prints 12888
# for the 130B row; 12288 is right.
LADDER_BOUNDS, LADDER_WIDTHS = (np.array(_SWEEP["ladder"][k], float) for k in ("bounds", "widths"))
# Width -> (layers, d_ff) of the sweep by the N_nv column of its data file, which is
# nominal_total - 2 * 16384 * d and so about 1 % off the shapes (4.8 % for the 302M family, whose
# nominal total was taken as 350M).
SWEEP_SHAPES = {int(n_nv): tuple(shape) for n_nv, shape in _SWEEP["sweep_shapes"].items()}


def ladder_width(n_nv: ArrayLike) -> Float[np.ndarray, "..."]:
    """Embedding width d of the published ladder for N_nv raw parameters."""
    return LADDER_WIDTHS[np.searchsorted(LADDER_BOUNDS, np.asarray(n_nv, np.float64))]


def block_parameters(layers: Count, width: Count, hidden: Count) -> Count:
    """N_nv of a Llama-style stack with multi-head attention and a gated MLP."""
    return layers * (4 * width**2 + 3 * width * hidden)


def flops_per_token(n: Count, *, layers: Count, width: Count, seq_len: Count) -> Count:
    """M = 6 (N + 2 seq_len layers width); for a mixture of experts give the active N."""
    return 6 * (n + 2 * seq_len * layers * width)


def training_flops(n_nv: ArrayLike, n_v: ArrayLike, tokens: ArrayLike) -> Float[np.ndarray, "..."]:
    """Training FLOPs, 6 (N_nv + N_v) D."""
    return 6 * (np.asarray(n_nv, np.float64) + n_v) * tokens  # pyright: ignore


def require_raw(name: str, value: float, quantity: str) -> float:
    """The value; InputError when it cannot be a raw count of `quantity` (a key of RAW)."""
    minimum, maximum, unit = RAW[quantity]
    if not np.isfinite(value) or value <= 0:
        raise InputError(f"{name}={value} is no positive number; give raw {unit}")
    if value < minimum:
        raise InputError(
            f"{name}={value:g} cannot be a count of {unit}; raw {unit} are expected, so write "
            f"{value:g}e9 for billions or {value:g}e6 for millions"
        )
    if value > maximum:
        raise InputError(f"{name}={value:g} is beyond {maximum:g} {unit}; raw {unit} are expected")
    return float(value)
