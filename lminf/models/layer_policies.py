"""The policy of each layer of a model: by_layer says which, and the others what a model refuses and
how far it reads.
"""

import math
from collections.abc import Sequence
from typing import Any

from lminf.attention import rope
from lminf.attention.policy import (
    AnyPolicy,
    FarPositions,
    Full,
    LayerPolicy,
    PerHead,
    PerLayer,
    Window,
    head_policies,
)
from lminf.errors import InputError


def by_layer(
    policy: AnyPolicy, *, windows: tuple[int | None, ...], num_kv_heads: int
) -> tuple[LayerPolicy, ...]:
    """The policy of every layer of a model whose layers were trained with these windows.

    Full is the model's own attention: a layer's trained window stays. Any other policy replaces
    the attention of the layers that read everything, or of all layers where none does; a layer
    that was trained local in a model that also reads everything (Gemma 2) stays local.
    """
    pattern = policy.policies if isinstance(policy, PerLayer) else (policy,)
    if not pattern or len(windows) % len(pattern):
        raise InputError(
            f"{len(pattern)} policies do not divide {len(windows)} layers; "
            f"give one policy for each layer, or a pattern whose length divides {len(windows)}"
        )
    for chosen in (part for part in pattern if isinstance(part, PerHead)):
        if whole_layers := [p for p in chosen.policies if not p.context_parallel]:
            raise InputError(
                f"{whole_layers[0].name} chooses for all heads of a layer, so it cannot be one of "
                f"several head policies; give it whole layers"
            )
        if len(chosen.policies) != num_kv_heads:
            raise InputError(
                f"{len(chosen.policies)} head policies but the model has {num_kv_heads} "
                f"key/value heads; give one policy for each"
            )
    mixed = any(width is None for width in windows)
    trained = (Full() if width is None else Window(width) for width in windows)
    return tuple(
        local if chosen == Full() or (mixed and local != Full()) else chosen
        for chosen, local in zip(pattern * (len(windows) // len(pattern)), trained, strict=True)
    )


def one_by_one(policy: AnyPolicy) -> Any:
    """The policy under which tokens that are read together attend as if each were read alone."""
    if isinstance(policy, PerLayer):
        return PerLayer(tuple(each.one_by_one for each in policy.policies))
    return policy.one_by_one


def last_alone(policies: Sequence[LayerPolicy]) -> bool:
    """Whether the last token of a prompt is read alone: not where rows end at other places."""
    return common_eviction(policies) is None and any(policy.last_alone for policy in policies)


def check_trained(policy: AnyPolicy, trained_length: int) -> None:
    """Refuses a window that reaches past the distances the model was trained on."""
    for part in head_policies(policy):
        if part.window is not None and part.window > trained_length:
            field = part.window_field
            raise InputError(
                f"{field}={part.window} but this model was trained at {trained_length} tokens; "
                f"use {field}<={trained_length} or a rotary scaling that stretches positions"
            )


def common_eviction(by_layer: Sequence[LayerPolicy]) -> int | None:
    """Tokens after which every layer that evicts may do so; None: no layer does."""
    turns = [layer.evict_every for layer in by_layer if layer.evict_every is not None]
    return math.gcd(*turns) if turns else None


def chunk_within(boundary: int | None, chunk: int) -> int:
    """The most tokens, of at most `chunk`, to read at once so that no chunk crosses a boundary."""
    if boundary is None:
        return chunk
    return boundary if boundary <= chunk else math.gcd(boundary, chunk)


def check_sinks(policy: AnyPolicy, sinks: bool) -> None:
    """Refuses a policy that goes by content where heads have learnt sinks: what such a head
    attends to is compared with its sink too.
    """
    for part in head_policies(policy):
        if sinks and (part.needs_prompt or not part.context_parallel):
            raise InputError(
                f"{part.name} goes by what tokens hold, but the heads of this model have learnt "
                f"sinks, which it does not count; use a policy of positions, such as lm_infinite"
            )


def check_rotary(policy: AnyPolicy, encoding: Any) -> None:
    """Refuses a policy that moves keys where nothing is rotated: by rotating them, or at all where
    their positions are part of what they hold.
    """
    learnt, still = isinstance(encoding, rope.Learnt), FarPositions()
    for part in head_policies(policy):
        moves = part.needs_rotary or (learnt and part.far_positions() != still)
        if moves and not isinstance(encoding, rope.Rotary):
            raise InputError(
                f"{part.name} moves keys by rotating them, but this model's positions are "
                f"{type(encoding).__name__}; use a policy that leaves them where they are"
            )


def max_length(policy: AnyPolicy, trained_length: int) -> int | None:
    """Tokens up to which no distance seems past the trained length; None: the policy sets no end.

    Only the policies that compress distances have one: past it they are where Full is past the
    trained length.
    """
    ends = [part.max_length(trained_length) for part in head_policies(policy)]
    return min((end for end in ends if end is not None), default=None)
