"""Choosing an implementation by platform, with a reason for every one that was passed over.

An implementation is a function that raises NotImplementedError, with the reason as its message,
for what it does not support. Nothing is chosen by trial and error beyond that.
"""

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import jax

from lminf.kernels.common import platforms

Choice: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Decision:
    """Which implementation served one call, and why those before it in the order did not."""

    op: str
    chosen: str
    refused: Mapping[str, str]  # name -> reason
    config: Any = None  # the chosen one's, where it has something to configure

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.refused.items()])


_record: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "kernel_decisions", default=None
)

_settled: contextvars.ContextVar[Any] = contextvars.ContextVar("kernel_config", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Decision]]:
    """Collects the decisions of every call traced inside the block."""
    decisions: list[Decision] = []
    token = _record.set(decisions)
    try:
        yield decisions
    finally:
        _record.reset(token)


def explain(fn: Callable, *args: Any, **kwargs: Any) -> list[Decision]:
    """One Decision for each kernel that `fn(*args, **kwargs)` would call; nothing is computed."""
    with recording() as decisions:
        # A fresh wrapper: an already traced `fn` would come from jax's cache and decide nothing.
        jax.eval_shape(lambda *a, **k: fn(*a, **k), *args, **kwargs)
    return decisions


def lazily(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `module`, which is imported when it is first called: Pallas takes a
    quarter of a second that a command on a CPU does not need.
    """

    def implementation(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return implementation


Config = TypeVar("Config")


def settled(kind: type[Config], given: Any, default: Callable[[], Config]) -> Config:
    """The config of the call under way, for the implementation to use and the record to name:
    `given`, or the default where it is None. NotImplementedError if it is another one's.
    """
    config = default() if given is None else given
    if not isinstance(config, kind):
        raise NotImplementedError(f"config is a {type(config).__module__}.{type(config).__name__}")
    _settled.set(config)
    return config


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    order: Mapping[str, Sequence[str]],
    choice: Choice,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The result of the first implementation in the order that supports the call.

    `choice` None means `order[platform]`; a name or a sequence of names is tried as given. Raises
    an ExceptionGroup that carries every reason if none can, ValueError for an unknown name.
    """
    names = _names(implementations, order, choice)
    reasons: list[NotImplementedError] = []
    refused: dict[str, str] = {}
    for name in names:
        _settled.set(None)
        try:
            result = implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            refused[name] = str(reason)
            reasons.append(NotImplementedError(f"{name}: {reason}"))
            continue
        decisions = _record.get()
        if decisions is not None:
            decisions.append(Decision(op, name, refused, _settled.get()))
        return result
    raise ExceptionGroup(f"{op}: no implementation in {list(names)} supports this call", reasons)


def _names(implementations, order, choice: Choice) -> tuple[str, ...]:
    if choice is None:
        return tuple(order.get(platforms.current(), order["cpu"]))
    names = (choice,) if isinstance(choice, str) else tuple(choice)
    unknown = [name for name in names if name not in implementations]
    if unknown or not names:
        raise ValueError(
            f"implementation={choice!r} is not known; choose from {sorted(implementations)}"
        )
    return names
