"""Parameters and training FLOPs that the laws are written in.

N_nv  transformer blocks only (norms ignored)     N_v = V d, counted once even when untied
N     the step law's count: non-embedding          M   FLOPs per token with attention
"""

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.models.spec import ModelSpec

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


def ladder_width(n_nv) -> Float[np.ndarray, "..."]:
    """Embedding width d of the published ladder for N_nv raw parameters."""
    return LADDER_WIDTHS[np.searchsorted(LADDER_BOUNDS, np.asarray(n_nv, np.float64))]


def block_parameters(layers, width, hidden):
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


def moe_parameters(
    *, layers, width, dense_layers, dense_hidden, experts, expert_hidden, shared_hidden
):
    """Non-embedding parameters of a mixture of experts; the router is ignored.

    With the number of experts per token in place of `experts`: the active parameters.
    """
    attention = layers * 4 * width**2
    dense = dense_layers * 3 * width * dense_hidden
    sparse = (layers - dense_layers) * 3 * width * (experts * expert_hidden + shared_hidden)
    return attention + dense + sparse


def flops_per_token(n, *, layers, width, seq_len):
    """M = 6 (N + 2 seq_len layers width); for a mixture of experts give the active N."""
    return 6 * (n + 2 * seq_len * layers * width)


def training_flops(n_nv, n_v, tokens):
    """6 (N_nv + N_v) D."""
    return 6 * (np.asarray(n_nv, np.float64) + n_v) * tokens


def round_up(vocab_size: float, multiple: int) -> int:
    return int(-(-vocab_size // multiple) * multiple)


# Smallest value that can be a raw count. Below it the number was in millions or billions.
RAW_MINIMUM = {
    "n_nv": (1e4, "parameters"),
    "n": (1e4, "parameters"),
    "d": (2e3, "tokens"),  # runs of models of 1e4 parameters
    "tokens": (1e5, "tokens"),
    "flops": (1e9, "FLOPs"),
    "width": (8, "channels"),
    "seq_len": (8, "tokens"),
}
RAW_MAXIMUM = {"n_nv": 1e14, "n": 1e14, "d": 1e17, "tokens": 1e17, "flops": 1e32, "width": 1e6}


def require_raw(name: str, value: float, quantity: str) -> float:
    """The value; InputError when it cannot be a raw count of `quantity` (a RAW_MINIMUM key)."""
    minimum, unit = RAW_MINIMUM[quantity]
    maximum = RAW_MAXIMUM.get(quantity, np.inf)
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
