"""Parameters and training FLOPs that the laws are written in.

N_nv  transformer blocks only (norms ignored)     N_v = V d, counted once even when untied
N     the step law's count: non-embedding          M   FLOPs per token with attention
"""

from typing import TypeVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lminf.errors import InputError
from lminf.models.spec import ModelSpec

Count = TypeVar("Count", int, float, np.ndarray)

# Width d by non-vocabulary parameters, upper bounds inclusive. One table of the paper prints 12888
# for the 130B row; 12288 is right. Source: arXiv:2407.13623, released code.
LADDER_BOUNDS = np.array(
    [50e6, 200e6, 500e6, 1e9, 2e9, 5e9, 10e9, 20e9, 50e9, 100e9, 200e9, 500e9, 1000e9]
)
LADDER_WIDTHS = np.array(
    [512, 768, 1024, 1536, 2048, 3200, 4096, 5120, 6048, 8192, 12288, 16384, 20480, 24576], float
)

# Sweep of arXiv:2407.13623: width -> (layers, d_ff) by the N_nv column of its data file, which is
# nominal_total - 2 * 16384 * d and so about 1 % off the shapes (4.8 % for the 302M family, whose
# nominal total was taken as 350M).
SWEEP_SHAPES = {
    33_222_784: (8, 512, 2048),
    84_834_176: (12, 768, 2048),
    150_834_176: (16, 768, 3072),
    316_445_568: (18, 1024, 4096),
    631_668_352: (20, 1536, 4800),
    1_129_891_136: (22, 2048, 5632),
    2_870_142_400: (24, 3200, 8192),
}


def ladder_width(n_nv: ArrayLike) -> Float[np.ndarray, "..."]:
    """Embedding width d of the published ladder for N_nv raw parameters."""
    return LADDER_WIDTHS[np.searchsorted(LADDER_BOUNDS, np.asarray(n_nv, np.float64))]


def block_parameters(layers: Count, width: Count, hidden: Count) -> Count:
    """N_nv of a Llama-style stack with multi-head attention and a gated MLP."""
    return layers * (4 * width**2 + 3 * width * hidden)


def spec_parameters(spec: ModelSpec, *, active: bool = False) -> int:
    """N_nv of any decoder: attention and MLP matrices; norms, biases and routers ignored.

    `active` counts the experts that one token goes to, not all of them.
    """
    attention = 2 * spec.width * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    hidden = spec.num_layers * spec.mlp.hidden_dim
    if spec.moe is not None:
        experts = spec.moe.top_k if active else spec.moe.experts
        mixed = experts * spec.moe.hidden_dim + spec.moe.shared_dim
        dense = spec.moe.dense_layers
        hidden = dense * spec.mlp.hidden_dim + (spec.num_layers - dense) * mixed
    matrices = 3 if spec.mlp.gated else 2
    return spec.num_layers * attention + matrices * spec.width * hidden


def flops_per_token(n: Count, *, layers: Count, width: Count, seq_len: Count) -> Count:
    """M = 6 (N + 2 seq_len layers width); for a mixture of experts give the active N."""
    return 6 * (n + 2 * seq_len * layers * width)


def training_flops(n_nv: ArrayLike, n_v: ArrayLike, tokens: ArrayLike) -> Float[np.ndarray, "..."]:
    """Training FLOPs, 6 (N_nv + N_v) D."""
    return 6 * (np.asarray(n_nv, np.float64) + n_v) * tokens  # pyright: ignore


# Smallest and largest value that can be a raw count; below it was in millions or billions.
RAW = {
    "n_nv": (1e4, 1e14, "parameters"),
    "n": (1e4, 1e14, "parameters"),
    "d": (2e3, 1e17, "tokens"),  # runs of models of 1e4 parameters
    "tokens": (1e5, 1e17, "tokens"),
    "flops": (1e9, 1e32, "FLOPs"),
    "width": (8, 1e6, "channels"),
    "seq_len": (8, np.inf, "tokens"),
}


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
