"""Which earlier tokens a token sees, and how far away they seem: each policy as data.

Every policy here is two branches over absolute positions q (query) and k (key), q >= k:

    near   q - k <  near_width            seen at the true distance
    far    q - k >= near_width, k < far_count   seen as if at positions (at_q(q), at_k(k)) * scale

`near_width = None` means all, `far_count = None` means every earlier token. The branches are
disjoint, so attention is one softmax over their union. A policy that bounds both is bounded in
memory: first `far_count` and last `near_width` tokens are all it can ever see.

| policy      | sees                  | far keys seem to be at          |
|-------------|-----------------------|---------------------------------|
| Full        | all earlier           | –                               |
| Window      | last w                | –                               |
| Lambda      | first g, last w       | where they are                  |
| LMInfinite  | first g, last w       | distance w (or `distance`)      |
| Streaming   | first g, last w       | their place in the cache        |
| ReRoPE      | all earlier           | distance w                      |
| LeakyReRoPE | all earlier           | distance w + (d - w) / stretch  |
| SelfExtend  | all earlier           | floor-divided positions         |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf import ranges
from lminf.attention import rope
from lminf.errors import InputError
from lminf.ranges import Range

PositionMap: TypeAlias = Callable[[Int[Array, "..."]], Int[Array, "..."]]
# Positions are 32 bits wide; what is held or chosen whatever the text has to fit in memory.
Tokens: TypeAlias = Annotated[int, Range(min=1, max=2**30)]
Distance: TypeAlias = Annotated[int, Range(min=0, max=2**30)]
Held: TypeAlias = Annotated[int, Range(min=1, max=2**20)]
HeldOrNone: TypeAlias = Annotated[int, Range(min=0, max=2**20)]
Layers: TypeAlias = Annotated[int, Range(min=0, max=2**20)]


class Far(NamedTuple):
    """Far pairs see each other as if at positions (at_q(q), at_k(k)), times `scale`."""

    at_q: PositionMap
    at_k: PositionMap
    scale: float = 1.0


def _same(positions):
    return positions


def _constant(value: int) -> PositionMap:
    return lambda positions: jnp.full_like(positions, value)


def register(name: str):
    """Makes a class of policies known by this name on command lines and in configs."""

    def known(kind):
        POLICIES[name], NAMES[kind] = kind, name
        return kind

    return known


class Named:
    """What is written on one line, as on the command line."""

    @property
    def name(self) -> str:
        """`lm_infinite:window=4096,sinks=10`, or `module:Class:…` of a class that is not ours."""
        kind = type(self)
        name = NAMES.get(kind) or f"{kind.__module__}:{kind.__qualname__}"
        written = {k: _written(v) for k, v in vars(self).items() if v is not None}
        set_fields = ",".join(f"{k}={v}" for k, v in written.items())
        return f"{name}:{set_fields}" if set_fields else name


def _written(value: Any) -> str:
    if isinstance(value, Named):
        return f"({value.name})" if ":" in value.name else value.name
    if isinstance(value, tuple):
        return f"({','.join(map(_written, value))})"
    return str(value)


class Policy(Named):
    """What all policies answer. Subclasses are frozen dataclasses and hash by value, and state the
    range of each of their numbers.
    """

    span = "window"  # the field that says how wide near_width is

    @property
    def turn_len(self) -> int | None:
        """Tokens between the boundaries that no chunk may cross; None: any may."""
        return None

    @property
    def near_width(self) -> int | None:
        """Tokens seen at their true distance, the query's own included; None: all."""
        return None

    @property
    def far_count(self) -> int | None:
        """Tokens at the start of the text seen beyond the near ones; None: all."""
        return 0

    def far(self) -> Far:
        """How far keys seem placed. Only asked where some are visible."""
        return Far(_same, _same)

    def query_gain(self, q: Int[Array, "*B"]) -> Float[Array, "*B"] | None:
        """Factor on the scores of queries at these positions; None: 1."""
        return None

    @property
    def bounded(self) -> bool:
        """Whether a fixed number of tokens is all that is ever seen."""
        return self.near_width is not None and self.far_count is not None

    def near(self, q: Int[Array, "..."], k: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Pairs that see each other at their true distance."""
        causal = k <= q
        return causal if self.near_width is None else causal & (q - k < self.near_width)

    def visible(self, q: Int[Array, "..."], k: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Pairs that see each other at all."""
        first = (k <= q) if self.far_count is None else (k <= q) & (k < self.far_count)
        return self.near(q, k) | first

    def __post_init__(self):
        ranges.check(self)


@dataclass(frozen=True)
class Full(Policy):
    """All earlier tokens at their true distance: the model's own attention."""


@dataclass(frozen=True)
class Window(Policy):
    """The last `window` tokens. Fluent only while the first tokens are still among them."""

    window: Tokens  # tokens, the query's own included

    @property
    def near_width(self) -> int:
        return self.window


@dataclass(frozen=True)
class Lambda(Window):
    """First `sinks` and last `window` tokens, where they are: the mask of LM-Infinite alone."""

    sinks: HeldOrNone  # tokens at the start that stay visible

    @property
    def far_count(self) -> int:
        return self.sinks


@dataclass(frozen=True)
class LMInfinite(Lambda):
    """Λ mask, and every far key at one distance. Source: Han et al. 2024, arXiv:2308.16137."""

    # Tokens; None: the window, one past the largest near distance.
    distance: Distance | None = None

    def far(self) -> Far:
        limit = self.window if self.distance is None else self.distance
        return Far(_constant(limit), _constant(0))


@dataclass(frozen=True)
class Streaming(Lambda):
    """Λ mask with positions counted inside the cache. Source: Xiao et al. 2023, arXiv:2309.17453.

    A sink at j is min(q, sinks + window - 1) - j away: its distance in a cache of sinks + window
    slots. The reference keeps `recent` tokens besides the query, so its recent is window - 1.
    """

    def far(self) -> Far:
        last_slot = self.sinks + self.window - 1
        return Far(lambda q: jnp.minimum(q, jnp.asarray(last_slot, q.dtype)), _same)


@dataclass(frozen=True)
class _SeesAll(Window):
    """Near tokens at their true distance, and every earlier one somewhere nearer than it is."""

    # Trained length: scores times max(1, ln(q+1)/ln(log_from)).
    log_from: Annotated[int, Range(min=2, max=2**30)] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self.far()  # refuses positions that are out of bounds

    @property
    def far_count(self) -> None:
        return None

    def query_gain(self, q):
        if self.log_from is None:
            return None
        # Padding stands below 0, where the logarithm would be NaN and spoil gradients.
        grown = jnp.log(jnp.maximum(q, 0).astype(jnp.float32) + 1) / math.log(self.log_from)
        return jnp.maximum(grown, 1.0)


@dataclass(frozen=True)
class ReRoPE(_SeesAll):
    """All earlier tokens, none farther than `window`. Source: the ReRoPE release (Su 2023)."""

    def far(self) -> Far:
        return Far(_constant(self.window), _constant(0))


@dataclass(frozen=True)
class LeakyReRoPE(_SeesAll):
    """All earlier tokens; beyond `window`, distance grows `stretch` times slower."""

    stretch: Tokens

    def far(self) -> Far:
        # w + (d - w)/s = (q + w(s - 1) - k)/s: whole positions, and one factor on the frequencies.
        offset = _offset(self.window, self.stretch)
        return Far(lambda q: q + offset, _same, 1.0 / self.stretch)


@dataclass(frozen=True)
class SelfExtend(_SeesAll):
    """All earlier tokens; beyond `window`, positions are floor-divided by `group`.

    Source: Jin et al. 2024, arXiv:2401.01325.
    """

    group: Tokens  # tokens that share one far position

    def far(self) -> Far:
        # floor(q/g) + w - w/g - floor(k/g), which need not be whole, in steps of 1/g.
        def floored(positions):
            return positions - positions % self.group

        offset = _offset(self.window, self.group)
        return Far(lambda q: floored(q) + offset, floored, 1.0 / self.group)


def _offset(window: int, steps: int) -> int:
    """Of far queries, in steps of 1/steps token."""
    if window * steps > 2**30:
        raise InputError(
            f"window={window} times {steps} is past the positions of 32 bits; give at most "
            f"{2**30 // window} for a window of {window}"
        )
    return window * (steps - 1)


@dataclass(frozen=True)
class PerHead(Named):
    """One policy for each key/value head, in order; its query heads follow."""

    policies: tuple[Policy, ...]  # [K]

    @property
    def bounded(self) -> bool:
        return all(policy.bounded for policy in self.policies)


@dataclass(frozen=True)
class PerLayer(Named):
    """One policy for each layer; a shorter tuple repeats, so it must divide the layers."""

    policies: tuple[Policy | PerHead, ...]


class ByContent(Policy):
    """A policy that reads for itself, because what is seen depends on what was read.

    It has a cache of its own layout, and may remember more beside the keys and values. Texts go
    through that cache too, in one call. It applies to all heads of a layer.
    """

    needs_rotary = True  # whether it places keys where they are not
    looked_up = 0  # tokens, at most, that are seen beside those near and the first `far_count`
    listens = False  # whether `told` wants to know what was read
    needs_prompt = False  # whether it acts at the end of a prompt, and a text needs one

    def layout(self, capacity: int) -> Any:
        """The cache.Layout for a text of at most `capacity` tokens."""
        raise NotImplementedError

    def extra(self, sizes: Any) -> Any:
        """What one layer remembers beside keys and values before it has read anything: a pytree
        of arrays [B, ...] for these cache.Sizes.
        """
        return ()

    def through(
        self, scoring: Any, layout: Any, stored_pos: Int[Array, "B S"], positions: Int[Array, "B T"]
    ) -> Any:
        """As attend.through: the step of every layer, and the new `pos`."""
        raise NotImplementedError

    def told(self, stored: Any, *, tokens, positions, hidden, logits: Callable) -> Any:
        """The cache once the model has read these tokens and come to these final states [B, T, D];
        `logits(hidden)` are what it expects after them.
        """
        raise NotImplementedError

    def after_prompt(self, scoring: Any, stored: Any, *, length: int, room: int) -> Any:
        """The cache at the end of prompts of at most `length` tokens, with room for more."""
        del scoring, length, room
        return stored


FULL = Full()

LayerPolicy: TypeAlias = Policy | PerHead
AnyPolicy: TypeAlias = Policy | PerHead | PerLayer

POLICIES: dict[str, type[AnyPolicy]] = {
    "full": Full,
    "window": Window,
    "lambda": Lambda,
    "lm_infinite": LMInfinite,
    "streaming": Streaming,
    "rerope": ReRoPE,
    "leaky_rerope": LeakyReRoPE,
    "self_extend": SelfExtend,
    "per_head": PerHead,
    "per_layer": PerLayer,
}
NAMES: dict[type, str] = {kind: name for name, kind in POLICIES.items()}


def by_layer(
    policy: AnyPolicy, *, windows: tuple[int | None, ...], num_kv_heads: int
) -> tuple[LayerPolicy, ...]:
    """The policy of every layer of a model whose layers were trained with these windows.

    Full is the model's own attention: a layer's trained window stays. Any other policy replaces
    the attention of the layers that read everything, or of all layers where none does; a layer
    that was trained local in a model that also reads everything (Gemma 2) stays local.
    """
    own = tuple(Full() if width is None else Window(width) for width in windows)
    pattern = policy.policies if isinstance(policy, PerLayer) else (policy,)
    if not pattern or len(windows) % len(pattern):
        raise InputError(
            f"{len(pattern)} policies do not divide {len(windows)} layers; "
            f"give one policy for each layer, or a pattern whose length divides {len(windows)}"
        )
    wanted = pattern * (len(windows) // len(pattern))
    for chosen in wanted:
        mixed_in = [p for p in _parts(chosen) if isinstance(p, ByContent)]
        if isinstance(chosen, PerHead) and mixed_in:
            raise InputError(
                f"{mixed_in[0].name} chooses for all heads of a layer, so it cannot be one of "
                f"several head policies; give it whole layers"
            )
        if isinstance(chosen, PerHead) and len(chosen.policies) != num_kv_heads:
            raise InputError(
                f"{len(chosen.policies)} head policies but the model has {num_kv_heads} "
                f"key/value heads; give one policy for each"
            )
    mixed = any(width is None for width in windows)
    return tuple(
        trained if chosen == Full() or (mixed and width is not None) else chosen
        for chosen, trained, width in zip(wanted, own, windows, strict=True)
    )


def check_trained(policy: AnyPolicy, trained_length: int) -> None:
    """Refuses a window that reaches past the distances the model was trained on."""
    for part in _parts(policy):
        if part.near_width is not None and part.near_width > trained_length:
            raise InputError(
                f"{part.span}={part.near_width} but this model was trained at {trained_length} "
                f"tokens; use {part.span}<={trained_length} or a rotary scaling that stretches "
                f"positions"
            )


def common_turn(by_layer: Sequence[LayerPolicy]) -> int | None:
    """Tokens after which every layer that reads in turns may begin one; None: no layer does."""
    turns = [part.turn_len for layer in by_layer for part in _parts(layer)]
    some = [turn for turn in turns if turn is not None]
    return math.gcd(*some) if some else None


def needing_prompt(by_layer: Sequence[LayerPolicy]) -> str | None:
    """The name of a policy that acts at the end of a prompt; None: no layer's does."""
    parts = [part for layer in by_layer for part in _parts(layer)]
    return next((p.name for p in parts if isinstance(p, ByContent) and p.needs_prompt), None)


def chunk_within(turn: int | None, chunk: int) -> int:
    """The most tokens, of at most `chunk`, to read at once so that no chunk goes past a turn."""
    if turn is None:
        return chunk
    return turn if turn <= chunk else math.gcd(turn, chunk)


def by_content(policy: AnyPolicy) -> bool:
    """Whether any layer's policy reads for itself."""
    return any(isinstance(part, ByContent) for part in _parts(policy))


def check_rotary(policy: AnyPolicy, encoding: Any) -> None:
    """Refuses a policy that moves keys by rotating them where nothing is rotated."""
    for part in _parts(policy):
        moves = isinstance(part, ByContent) and part.needs_rotary
        if moves and not isinstance(encoding, rope.Rotary):
            raise InputError(
                f"{part.name} moves keys by rotating them, but this model's positions are "
                f"{type(encoding).__name__}; use a policy that leaves them where they are"
            )


def longest(policy: AnyPolicy, trained_length: int) -> int | None:
    """Tokens up to which no distance seems past the trained length; None: the policy sets no end.

    Only the policies that compress distances have one: past it they are where Full is past the
    trained length.
    """
    ends = []
    for part in _parts(policy):
        if isinstance(part, SelfExtend):
            ends.append((trained_length - part.window + part.window // part.group) * part.group)
        elif isinstance(part, LeakyReRoPE):
            ends.append((trained_length - part.window) * part.stretch + part.window)
    return min(ends, default=None)


def _parts(policy: AnyPolicy) -> list[Policy]:
    if not isinstance(policy, Policy):
        return [leaf for part in policy.policies for leaf in _parts(part)]
    return [policy]
