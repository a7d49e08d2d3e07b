"""Position encodings: rotary angles and their scalings, ALiBi slopes. Everything takes positions.

A rotary angle is `position * frequency`, reduced modulo one turn. In float32 that product is off
by 0.05 rad at a million tokens and is meaningless at 10^8, so the reduction is done in integers:
a frequency is held as a 64-bit binary fraction of a turn, the product with a 32-bit position wraps
around by itself, and only the remainder becomes a float. Angles are good to 3e-7 rad at any
position, and the difference of two positions is all that a score can see.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt32

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range

TURN = 2 * math.pi

# Ranges of what a schedule is made of. The largest and smallest values leave every frequency within
# what a 64-bit fraction of a turn can hold.
Length: TypeAlias = Annotated[int, Range(min=1, max=2**31 - 1)]  # tokens
Factor: TypeAlias = Annotated[float, Range(min=1e-3, max=1e6)]
Base: TypeAlias = Annotated[float, Range(above=1, max=1e15)]
Temperature: TypeAlias = Annotated[float, Range(min=1e-3, max=1e3)]


# --- Frequency schedules. `frequencies` gives rad/token, [dim / 2], fastest channel first. --------


def _powers(base, dim: int):
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _slowed(theta: np.ndarray, factor: float, ramp: np.ndarray) -> np.ndarray:
    """Frequencies divided by `factor` where the ramp is 0, kept where it is 1, blended between."""
    keep = np.clip(ramp, 0.0, 1.0)
    return (1 - keep) * theta / factor + keep * theta


class _Schedule:
    follows_length = False  # whether frequencies change with the number of tokens read
    temperature = property(lambda self: 1.0)  # factor on cos and sin

    def __post_init__(self):
        ranges.check(self)


@dataclass(frozen=True)
class Unscaled(_Schedule):
    """theta_m = base^(-2m/dim). Source: Su et al. 2021, arXiv:2104.09864."""

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        return _powers(base, dim)


@dataclass(frozen=True)
class Linear(_Schedule):
    """Positions divided by `factor`: interpolation. Source: Chen et al. 2023, arXiv:2306.15595."""

    factor: Factor

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        return _powers(base, dim) / self.factor


@dataclass(frozen=True)
class NTKAware(_Schedule):
    """Base times alpha^(dim/(dim-2)): the slowest channel slows by alpha, the fastest stays."""

    alpha: Factor

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        return _powers(base * self.alpha ** (dim / (dim - 2)), dim)


@dataclass(frozen=True)
class DynamicNTK(_Schedule):
    """NTK-aware with the base following the current length n once n exceeds the trained length.

    base' = base * (alpha*n/trained - (alpha - 1))^(dim/(dim-2)). All keys share the base of the
    current n, so caches must hold keys un-rotated.
    """

    alpha: Factor
    trained_length: Length

    follows_length = True

    def frequencies_at(
        self, base: float, dim: int, length: Int[Array, "*B"]
    ) -> Float32[Array, "*B P"]:
        """Frequencies when `length` tokens (traced integers) have been read."""
        stretch = self.alpha * length.astype(jnp.float32) / self.trained_length - (self.alpha - 1)
        grown = math.log(base) + jnp.log(jnp.maximum(stretch, 1.0)) * (dim / (dim - 2))
        exponent = (-np.arange(0, dim, 2) / dim).astype(np.float32)
        return jnp.exp(grown[..., None] * exponent.reshape((1,) * length.ndim + (-1,)))


@dataclass(frozen=True)
class YaRN(_Schedule):
    """Interpolated and original frequencies blended by channel, cos and sin times a temperature.

    Channels that turn more than `beta_fast` times within the trained length keep their frequency,
    those that turn less than `beta_slow` times are slowed by `factor`, a linear ramp between.
    Source: Peng et al. 2023, arXiv:2309.00071.
    """

    factor: Factor
    trained_length: Length
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    attention_factor: Temperature | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True  # round the ramp's ends outwards to whole channels

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise InputError(
                f"YaRN's beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; give the "
                f"larger number of turns first"
            )

    @property
    def temperature(self) -> float:
        usual = 0.1 * math.log(max(self.factor, 1)) + 1.0
        return usual if self.attention_factor is None else self.attention_factor

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        def channel(turns):  # the (real-valued) channel that turns this often in the trained length
            return dim * math.log(self.trained_length / (turns * TURN)) / (2 * math.log(base))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2) - low) / max(high - low, 1e-3)
        return _slowed(_powers(base, dim), self.factor, 1.0 - ramp)


@dataclass(frozen=True)
class Llama3(_Schedule):
    """Wavelengths past trained/low_freq_factor slowed by `factor`, short ones kept, a ramp between.

    Source: the Llama 3.1 release (Dubey et al. 2024, arXiv:2407.21783).
    """

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    trained_length: Length

    def __post_init__(self):
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"Llama 3's low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}; give the smaller number first"
            )

    def frequencies(self, base: float, dim: int) -> np.ndarray:
        theta = _powers(base, dim)
        turns = self.trained_length * theta / TURN  # within the trained length
        span = self.high_freq_factor - self.low_freq_factor
        return _slowed(theta, self.factor, (turns - self.low_freq_factor) / span)


@dataclass(frozen=True)
class LongRoPE(_Schedule):
    """Every frequency divided by a factor of its own: one list up to the trained length, another
    beyond it, for all keys alike, so caches must hold keys un-rotated.

    Source: Ding et al. 2024, arXiv:2402.13753, whose search gives the factors of one model.
    """

    short_factor: tuple[Factor, ...]  # [dim / 2]
    long_factor: tuple[Factor, ...]  # [dim / 2]
    trained_length: Annotated[int, Range(min=2, max=2**31 - 1)]  # tokens
    factor: Factor  # how many times the trained length the long list reaches
    attention_factor: Temperature | None = None  # None: sqrt(1 + ln(factor) / ln(trained length))

    follows_length = True

    @property
    def temperature(self) -> float:
        usual = math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.trained_length))
        return usual if self.attention_factor is None else self.attention_factor

    def frequencies(self, base: float, dim: int, factors: tuple[float, ...]) -> np.ndarray:
        return _powers(base, dim) / np.array(factors)


Scaling = Unscaled | Linear | NTKAware | DynamicNTK | YaRN | Llama3 | LongRoPE
SCALINGS: dict[str, type] = {
    "unscaled": Unscaled,
    "linear": Linear,
    "ntk": NTKAware,
    "dynamic_ntk": DynamicNTK,
    "yarn": YaRN,
    "llama3": Llama3,
    "longrope": LongRoPE,
}


# --- Encodings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """Rotary encoding of the first `dim` channels of each head; the others carry no position."""

    base: Base
    # Channels, even; None: all of the head's, for arrays without a model.
    dim: Annotated[int, Range(min=2, max=2**16)] | None = None
    layout: Literal["half", "interleaved"] = "half"  # pairs (c, c + dim/2), or (2c, 2c + 1)
    scaling: Scaling = Unscaled()

    def __post_init__(self):
        ranges.check(self)
        if self.dim is not None and self.dim % 2:
            raise InputError(f"Rotary.dim is {self.dim}; channels are rotated in pairs")
        if self.dim == 2 and isinstance(self.scaling, NTKAware | DynamicNTK):
            raise InputError(
                f"Rotary.dim is 2; {type(self.scaling).__name__} needs 4 channels or more, because "
                f"it slows all but the first pair"
            )
        if isinstance(self.scaling, LongRoPE) and self.dim is not None:
            lengths = {len(self.scaling.short_factor), len(self.scaling.long_factor)}
            if lengths != {self.dim // 2}:
                raise InputError(
                    f"LongRoPE has lists of {' and '.join(map(str, sorted(lengths)))} factors for "
                    f"{self.dim // 2} pairs of channels; give one factor for each pair"
                )


@dataclass(frozen=True)
class Alibi:
    """Score minus slope * distance, by head. Source: Press et al. 2022, arXiv:2108.12409."""

    max_bias: Annotated[float, Range(above=0, max=1e3)]
    scale: Annotated[float, Range(above=0, max=1e3)] = 1.0  # of every slope: Falcon's is dim**-0.5

    def __post_init__(self):
        ranges.check(self)

    def slopes(self, num_heads: int) -> np.ndarray:
        """[N] float32. Where N is no power of two, the odd slopes of the next power fill up."""
        ceiling = 2 ** math.ceil(math.log2(num_heads))
        slopes = 2.0 ** (-np.arange(1, ceiling + 1) * self.max_bias / ceiling)
        if ceiling != num_heads:
            slopes = np.concatenate([slopes[1::2], slopes[::2]])[:num_heads]
        return (slopes * self.scale).astype(np.float32)


@dataclass(frozen=True)
class NoEncoding:
    """No positions at all; order is known only through the causal mask."""


@dataclass(frozen=True)
class Learnt:
    """A vector for each position, added to the embedding; attention itself knows no positions."""

    length: Length  # positions that have a vector
    offset: Annotated[int, Range(min=0, max=2**16)]  # rows of the table before that of position 0

    def __post_init__(self):
        ranges.check(self)


Encoding = Rotary | Alibi | NoEncoding | Learnt


@dataclass(frozen=True)
class QueryGain:
    """Queries times 1 + beta ln(1 + floor(position / length)): in a long text the softmax would
    otherwise flatten. Source: Llama 4's temperature tuning, as Ministral 3 runs it (Mistral 2025).
    """

    beta: Annotated[float, Range(above=0, max=1e3)]
    length: Length  # tokens whose queries stay as they are

    def __post_init__(self):
        ranges.check(self)

    def at(self, positions: Int[Array, "*B T"]) -> Float32[Array, "*B T"]:
        """The factor of queries at these positions; 1 of padding."""
        laps = jnp.maximum(positions, 0) // self.length
        return 1 + jnp.float32(self.beta) * jnp.log1p(laps.astype(jnp.float32))


# --- Angles ---------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """cos and sin of every pair's angle, times the schedule's temperature: [..., T, P] float32."""

    cos: Float32[Array, "*B T P"]
    sin: Float32[Array, "*B T P"]


def rotation(
    encoding: Rotary,
    positions: Int[Array, "*B T"],
    *,
    scale: float = 1.0,
    length: Int[Array, "*B 1"] | Int[Array, ""] | None = None,
) -> Rotation:
    """Rotation of every position. `scale` stretches the positions (1/k for Leaky ReRoPE);
    `length` is how many tokens have been read, in each row, where the schedule follows it.
    """
    scaling, dim = encoding.scaling, encoding.dim
    assert dim is not None  # a model's encoding says it
    if scaling.follows_length and length is None:
        raise ValueError(
            f"{type(scaling).__name__} needs length=, the number of tokens read so far"
        )
    if isinstance(scaling, DynamicNTK):
        assert length is not None
        turns = _split_traced(scaling.frequencies_at(encoding.base, dim, length) * (scale / TURN))
    elif isinstance(scaling, LongRoPE):
        assert length is not None
        short, long = (
            _split(scaling.frequencies(encoding.base, dim, factors) * (scale / TURN))
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        beyond = length[..., None] > scaling.trained_length
        turns = tuple(
            jnp.where(beyond, *(jnp.expand_dims(x, range(length.ndim)) for x in words))
            for words in zip(long, short, strict=True)
        )
    else:
        turns = _split(scaling.frequencies(encoding.base, dim) * (scale / TURN))
    # One frequency for all rows, or one for each row: [P] or [*B 1 P] beside positions [*B T 1].
    rank = positions.ndim + 1
    high, low = (jnp.reshape(word, (1,) * (rank - word.ndim) + word.shape) for word in turns)
    angle = _angle(positions[..., None], high, low)
    return Rotation(
        jnp.cos(angle) * jnp.float32(scaling.temperature),
        jnp.sin(angle) * jnp.float32(scaling.temperature),
    )


class RotationTable(NamedTuple):
    """Rotations of the positions below F^2, each composed of two: that of the multiple of F before
    it, and that of what is left.
    """

    coarse: Rotation  # [B or 1, F, P], of the multiples of F
    fine: Rotation  # [B or 1, F, P], of 0 to F - 1, without the schedule's temperature; F = 2^n

    def at(self, positions: Int[Array, "*B"]) -> Rotation:
        """[B, ..., P] of positions [B, ...]; those that are not in the table get another's."""
        rows, count, _ = self.fine.cos.shape
        positions = jnp.clip(positions, 0, count**2 - 1)
        row = jnp.arange(len(positions), dtype=jnp.int32) % rows
        row = jnp.expand_dims(row, range(1, positions.ndim))
        a_cos, a_sin = (x[row, positions // count] for x in self.coarse)
        b_cos, b_sin = (x[row, positions % count] for x in self.fine)
        return Rotation(a_cos * b_cos - a_sin * b_sin, a_sin * b_cos + a_cos * b_sin)


def rotate(
    x: Float[Array, "*B T N H"], by: Rotation, layout: Literal["half", "interleaved"]
) -> Float[Array, "*B T N H"]:
    """x with its first 2P channels rotated; the same dtype, the arithmetic in float32."""
    pairs = by.cos.shape[-1]
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if layout == "half":
        a, b = turned[..., :pairs], turned[..., pairs:]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    return jnp.concatenate([out.astype(x.dtype), rest], -1)


def _split(turns_per_token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A fraction of a turn as the two 32-bit words of a 64-bit binary fraction."""
    words = [round(float(t) * 2.0**64) % 2**64 for t in turns_per_token]
    return (
        np.array([w >> 32 for w in words], np.uint32),
        np.array([w & 0xFFFFFFFF for w in words], np.uint32),
    )


def _split_traced(turns_per_token: Float32[Array, "*B P"]):
    # A float32 has 24 bits, so both words are exact and every position uses the same frequency.
    high = turns_per_token * jnp.float32(2.0**32)
    high_word = jnp.floor(high)
    low = (high - high_word) * jnp.float32(2.0**32)
    return high_word.astype(jnp.uint32), low.astype(jnp.uint32)


def _angle(positions: Int[Array, "..."], high, low) -> Float32[Array, "..."]:
    """positions * frequency modulo one turn, in (-pi, pi]; |error| < 3e-7."""
    position = jax.lax.bitcast_convert_type(positions.astype(jnp.int32), jnp.uint32)
    carry = _multiply_high(position, low)
    carry = carry - jnp.where(positions < 0, low, jnp.uint32(0))
    phase = position * high + carry
    signed = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32)
    return signed * jnp.float32(TURN / 2.0**32)


def _multiply_high(
    a: UInt32[Array, "..."], b: UInt32[Array | np.ndarray, "..."]
) -> UInt32[Array, "..."]:
    """Upper 32 bits of a 64-bit product, without 64-bit integers."""
    half = jnp.uint32(0xFFFF)
    a_low, a_high, b_low, b_high = a & half, a >> 16, b & half, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    low_middle = a_low * b_high + (middle & half)
    return a_high * b_high + (middle >> 16) + (low_middle >> 16)
