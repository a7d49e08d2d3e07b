"""Which earlier tokens a token sees, and how far away they seem: each policy as data.

A policy of positions is two branches over absolute positions q (query) and k (key), q >= k:

    near   q - k < window                      seen at the true distance
    far    q - k >= window, k < num_sinks      as if at positions (query(q), key(k)) * scale

`window = None` means all, `num_sinks = None` means every earlier token. The branches are
disjoint, so attention is one softmax over their union. Those that go by what tokens hold are in
`lminf.attention.policies`. None computes attention: `attend` does, and `sparse`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range

PositionMap: TypeAlias = Callable[[Int[Array, "..."]], Int[Array, "..."]]
# Positions are 32 bits wide; counts that are kept whatever the text have to fit in memory.
Tokens: TypeAlias = Annotated[int, Range(min=1, max=2**30)]
Distance: TypeAlias = Annotated[int, Range(min=0, max=2**30)]
Count: TypeAlias = Annotated[int, Range(min=1, max=2**20)]
CountOrNone: TypeAlias = Annotated[int, Range(min=0, max=2**20)]
Layers: TypeAlias = Annotated[int, Range(min=0, max=2**20)]


def _same(positions):
    return positions


class FarPositions(NamedTuple):
    """Far pairs see each other as if at positions (query(q), key(k)), times `scale`."""

    query: PositionMap = _same
    key: PositionMap = _same
    scale: float = 1.0


def _constant(value: int) -> PositionMap:
    return lambda positions: jnp.full_like(positions, value)


Kind = TypeVar("Kind", bound=type)  # a class of policies
POLICIES: dict[str, type["AnyPolicy"]] = {}
NAMES: dict[type, str] = {}


def register(name: str) -> Callable[[Kind], Kind]:
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


class LayerPolicy(Named):
    """What a layer's cache and the language model ask of its policy."""

    bounded: Any  # bool: whether a fixed number of tokens is all that is ever seen

    evict_every: Any = None  # int | None: tokens between the boundaries that no chunk may cross
    context_parallel = True  # whether a row's tokens may lie on several devices
    needs_rotary = False  # whether it places keys where they are not, by rotating them
    needs_prompt = False  # whether it acts at the end of a prompt, and a text needs one
    last_alone = False  # whether the last token of a prompt is read alone
    # tuple[int, ...]: from which on, of the layers with this policy, it does otherwise.
    layer_thresholds: Any = ()
    needs_hidden = False  # whether `observe_hidden` wants to know what was read
    # LayerPolicy | None: under which tokens that are read together see what they would see one
    # after another, with the same cache; None: there is none.
    one_by_one: Any = property(lambda self: self)
    # Whether its state holds sums over tokens, or what one of them found: none can be taken back.
    accumulates = False

    def cache_layout(self, capacity: int) -> Any:
        """The cache layout for a text of at most `capacity` tokens; None: what positions need."""
        return None

    def init_state(self, shape: Any) -> Any:
        """What one layer remembers beside keys and values before it has read anything: a pytree
        of arrays [B, ...] for this cache.CacheShape.
        """
        return ()

    def observe_hidden(
        self, layer_caches: Any, *, tokens: Array, positions: Array, hidden: Array, logits: Callable
    ) -> Any:
        """The caches of the layers under this policy, once the model has read these tokens and come
        to these final states [B, T, D]; `logits(hidden)` are what it expects after them.
        """
        raise NotImplementedError

    def extend(self, config: Any, layout: Any, stored_pos: Array, positions: Array) -> Any:
        """As `attend.extend`, for a cache whose slots only the policy knows: a SlotCache."""
        raise NotImplementedError

    def observe_queries(self, state: Any, q: Array, layer: Any) -> Any:
        """The state after these queries of a prompt, un-rotated."""
        return state

    def compress_prompt(self, config: Any, cache: Any, *, length: int, room: int) -> Any:
        """The cache at the end of prompts of at most `length` tokens, with room for more."""
        raise NotImplementedError


class Policy(LayerPolicy):
    """What the policies of a head answer. Subclasses are frozen dataclasses and hash by value, and
    state the range of each of their numbers.

    What may be a field has no default here: a dataclass would take it for the field's own.
    """

    # int | None, as a field or property. Tokens seen at their true distance, the query's own
    # included; None: all.
    window: Any
    # int | None. Tokens at the start seen beyond those, by default the field `sinks`; None: all.
    num_sinks: Any = property(attrgetter("sinks"))

    window_field = "window"  # the field that `window` comes from
    max_selected = 0  # tokens, at most, that are seen beside the near ones and the sinks

    def far_positions(self) -> FarPositions:
        """How far keys seem placed. Only asked where some are visible."""
        return FarPositions()

    def query_gain(self, q: Int[Array, "*B"]) -> Float[Array, "*B"] | None:
        """Factor on the scores of queries at these positions; None: 1."""
        return None

    def max_length(self, trained_length: int) -> int | None:
        """Tokens up to which no distance seems past the trained length; None: there is no end."""
        return None

    @property
    def bounded(self) -> bool:
        return self.window is not None and self.num_sinks is not None

    def in_window(self, q: Int[Array, "..."], k: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Pairs that see each other at their true distance."""
        causal = k <= q
        return causal if self.window is None else causal & (q - k < self.window)

    def visible(self, q: Int[Array, "..."], k: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Pairs that see each other at all."""
        first = (k <= q) if self.num_sinks is None else (k <= q) & (k < self.num_sinks)
        return self.in_window(q, k) | first

    def problems(self) -> Iterator[str]:
        """What is wrong with fields that are each in their range, in a sentence each."""
        yield from ()

    def __post_init__(self):
        ranges.check(self)
        for problem in self.problems():
            raise InputError(problem)


@register("full")
@dataclass(frozen=True)
class Full(Policy):
    """All earlier tokens at their true distance: the model's own attention."""

    window = None
    num_sinks = 0


@register("window")
@dataclass(frozen=True)
class Window(Policy):
    """The last `window` tokens. Fluent only while the first tokens are still among them."""

    window: Tokens  # tokens, the query's own included

    num_sinks = 0


@register("lambda")
@dataclass(frozen=True)
class Lambda(Window):
    """First `sinks` and last `window` tokens, where they are: the mask of LM-Infinite alone."""

    sinks: CountOrNone  # tokens at the start that stay visible

    num_sinks = Policy.num_sinks


@register("lm_infinite")
@dataclass(frozen=True)
class LMInfinite(Lambda):
    """Λ mask, and every far key at one distance. Source: Han et al. 2024, arXiv:2308.16137."""

    # Tokens; None: the window, one past the largest near distance.
    distance: Distance | None = None

    def far_positions(self) -> FarPositions:
        limit = self.window if self.distance is None else self.distance
        return FarPositions(_constant(limit), _constant(0))


@register("streaming")
@dataclass(frozen=True)
class Streaming(Lambda):
    """Λ mask with positions counted inside the cache. Source: Xiao et al. 2023, arXiv:2309.17453.

    A sink at j is min(q, sinks + window - 1) - j away: its distance in a cache of sinks + window
    slots. The reference keeps `recent` tokens besides the query, so its recent is window - 1.
    """

    def far_positions(self) -> FarPositions:
        last_slot = self.sinks + self.window - 1
        return FarPositions(lambda q: jnp.minimum(q, jnp.asarray(last_slot, q.dtype)))


@dataclass(frozen=True)
class _SeesAll(Window):
    """Near tokens at their true distance, and every earlier one somewhere nearer than it is."""

    # Trained length: scores times max(1, ln(q+1)/ln(log_from)).
    log_from: Annotated[int, Range(min=2, max=2**30)] | None = field(default=None, kw_only=True)

    num_sinks = None
    steps = property(lambda self: 1)  # far positions are counted in steps of 1/steps token

    def problems(self) -> Iterator[str]:
        if self.window * self.steps > 2**30:
            yield (
                f"window={self.window} times {self.steps} is past the positions of 32 bits; give "
                f"at most {2**30 // self.window} for a window of {self.window}"
            )

    def query_gain(self, q: Int[Array, "*B"]) -> Float[Array, "*B"] | None:
        if self.log_from is None:
            return None
        # Padding stands below 0, where the logarithm would be NaN and spoil gradients.
        grown = jnp.log(jnp.maximum(q, 0).astype(jnp.float32) + 1) / math.log(self.log_from)
        return jnp.maximum(grown, 1.0)


@register("rerope")
@dataclass(frozen=True)
class ReRoPE(_SeesAll):
    """All earlier tokens, none farther than `window`. Source: the ReRoPE release (Su 2023)."""

    def far_positions(self) -> FarPositions:
        return FarPositions(_constant(self.window), _constant(0))


@register("leaky_rerope")
@dataclass(frozen=True)
class LeakyReRoPE(_SeesAll):
    """All earlier tokens; beyond `window`, distance grows `stretch` times slower."""

    stretch: Tokens

    steps = property(attrgetter("stretch"))

    def far_positions(self) -> FarPositions:
        # w + (d - w)/s = (q + w(s - 1) - k)/s: whole positions, and one factor on the frequencies.
        offset = self.window * (self.stretch - 1)
        return FarPositions(lambda q: q + offset, scale=1.0 / self.stretch)

    def max_length(self, trained_length: int) -> int:
        return (trained_length - self.window) * self.stretch + self.window


@register("self_extend")
@dataclass(frozen=True)
class SelfExtend(_SeesAll):
    """All earlier tokens; beyond `window`, positions are floor-divided by `group`.

    Source: Jin et al. 2024, arXiv:2401.01325.
    """

    group: Tokens  # tokens that share one far position

    steps = property(attrgetter("group"))

    def far_positions(self) -> FarPositions:
        # floor(q/g) + w - w/g - floor(k/g), which need not be whole, in steps of 1/g.
        def floored(positions):
            return positions - positions % self.group

        offset = self.window * (self.group - 1)
        return FarPositions(lambda q: floored(q) + offset, floored, 1.0 / self.group)

    def max_length(self, trained_length: int) -> int:
        return (trained_length - self.window + self.window // self.group) * self.group


@register("per_head")
@dataclass(frozen=True)
class PerHead(LayerPolicy):
    """One policy for each key/value head, in order; its query heads follow."""

    policies: tuple[Policy, ...]  # [K]

    @property
    def bounded(self) -> bool:
        return all(policy.bounded for policy in self.policies)


@register("per_layer")
@dataclass(frozen=True)
class PerLayer(Named):
    """One policy for each layer; a shorter tuple repeats, so it must divide the layers."""

    policies: tuple[LayerPolicy, ...]


FULL = Full()

AnyPolicy: TypeAlias = LayerPolicy | PerLayer


def head_policies(policy: AnyPolicy) -> tuple[Policy, ...]:
    """The different policies of all heads and layers, in order."""
    if isinstance(policy, PerHead | PerLayer):
        parts = [part for each in policy.policies for part in head_policies(each)]
        return tuple(dict.fromkeys(parts))
    assert isinstance(policy, Policy)
    return (policy,)
