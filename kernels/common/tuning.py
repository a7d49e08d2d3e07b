"""Tuned configs: explicit argument, then overlays, then the shipped table, then the heuristic.

    table = tuning.autotune(fn, *args)      # times; nothing else in this package ever does
    table.dump("mine.json")
    with tuning.load("mine.json"):
        jax.jit(fn)(*args)

A config is looked up when a call is traced, so a function that was jitted before keeps its own.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lminf.kernels.common import bench, config, platforms
from lminf.kernels.common.config import Key

TUNED = pathlib.Path(__file__).parents[1] / "tuned"
# What a device calls itself -> its table.
DEVICES = {
    "H100": "h100", "H200": "h200", "A100": "a100", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e",
}  # fmt: skip


@dataclass
class Table:
    """Tuned configs: key -> implementation -> fields. As a context, it comes before all others."""

    entries: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    _contexts: list = field(default_factory=list, repr=False, compare=False)

    def find(self, key: Key, implementation: str) -> Any:
        """The config for a call; None if it was not tuned."""
        fields = self.entries.get(str(key), {}).get(implementation)
        return None if fields is None else config.from_json(key.op, implementation, fields)

    def put(self, key: Key, implementation: str, chosen: Any) -> None:
        self.entries.setdefault(str(key), {})[implementation] = config.to_json(chosen)

    def dump(self, path: str | Path) -> None:
        pathlib.Path(path).write_text(json.dumps(self.entries, indent=1, sort_keys=True) + "\n")

    def __enter__(self) -> "Table":
        self._contexts.append(overlay(self))
        return self._contexts[-1].__enter__()

    def __exit__(self, *error) -> None:
        self._contexts.pop().__exit__(*error)


def load(path: str | Path) -> Table:
    """A table that `Table.dump` wrote."""
    return Table(json.loads(pathlib.Path(path).read_text()))


_overlays: contextvars.ContextVar[tuple[Table, ...]] = contextvars.ContextVar(
    "kernel_tables", default=()
)
_asked: contextvars.ContextVar[list[tuple[Key, str]] | None] = contextvars.ContextVar(
    "kernel_tunables", default=None
)


@contextlib.contextmanager
def overlay(table: Table) -> Iterator[Table]:
    """Inside the block, `table` comes before the tables outside it."""
    token = _overlays.set((table, *_overlays.get()))
    try:
        yield table
    finally:
        _overlays.reset(token)


def lookup(key: Key, implementation: str) -> Any:
    """The tuned config of a call; None leaves the choice to the implementation's heuristic."""
    for table in (*_overlays.get(), shipped(device())):
        config = table.find(key, implementation)
        if config is not None:
            return config
    return None


def device() -> str:
    """The name of this device's table: "cpu", "h100", …, or "" for one that has none."""
    if platforms.current() == "cpu":
        return "cpu"
    kind = platforms.device().device_kind
    return next((name for part, name in DEVICES.items() if part in kind), "")


@functools.cache
def shipped(name: str) -> Table:
    """The table that comes with the package; empty where none was measured."""
    path = TUNED / f"{name}.json"
    return load(path) if name and path.exists() else Table()


def tuned(implementations: Mapping[str, Callable], key: Key) -> dict[str, Callable]:
    """The implementations, whose last argument, a config, is looked up where it is None."""

    def wrapped(name: str, implementation: Callable) -> Callable:
        def call(*args):
            *rest, chosen = args
            result = implementation(*rest, lookup(key, name) if chosen is None else chosen)
            requests = _asked.get()
            if requests is not None and chosen is None:
                requests.append((key, name))
            return result

        return call

    return {name: wrapped(name, fn) for name, fn in implementations.items()}


def autotune(fn: Callable, *args: Any, repeats: int = 5, rounds: int = 3) -> Table:
    """Configs that make `fn(*args)` faster than the heuristic does, for each kernel it calls.

    From each implementation's default config, one number at a time is halved or doubled, as long as
    that helps and for at most `rounds`. Candidates and heuristic are timed in turns; the winner is
    kept if its median is 3 % below the heuristic's.
    """
    requests: list[tuple[Key, str]] = []
    token = _asked.set(requests)
    try:
        jax.eval_shape(lambda *a: fn(*a), *args)
    finally:
        _asked.reset(token)
    best = Table()
    for key, implementation in dict.fromkeys(requests):
        made = config.config_class(key.op, implementation)
        if made is None:
            continue
        candidates: list[Any] = [None, made(), *config.neighbours(made())]
        medians = _medians(fn, args, best, key, implementation, candidates, repeats)
        for _ in range(rounds):
            winner = min(medians, key=medians.__getitem__)
            around = [] if winner is None else [*config.neighbours(winner)]
            fresh = [c for c in around if c not in medians]
            if not fresh:
                break
            again = [None, winner, *fresh]
            medians |= _medians(fn, args, best, key, implementation, again, repeats)
        winner = min(medians, key=medians.__getitem__)
        if winner is not None and medians[winner] < 0.97 * medians[None]:
            best.put(key, implementation, winner)
    return best


def _medians(
    fn, args, best: Table, key: Key, implementation: str, candidates: Sequence[Any], repeats: int
) -> dict[Any, float]:
    """Median seconds of every candidate that compiles; None is the heuristic."""
    programs = {}
    for number, candidate in enumerate(candidates):
        trial = Table({name: dict(configs) for name, configs in best.entries.items()})
        if candidate is not None:
            trial.put(key, implementation, candidate)
        try:
            with trial:
                compiled = jax.jit(lambda *a: fn(*a)).lower(*args).compile()
        # A size that does not fit: refused by us, or by a compiler that runs out of memory.
        except (NotImplementedError, ValueError, ExceptionGroup, jax.errors.JaxRuntimeError):
            continue
        programs[str(number)] = bench.blocking(compiled, [args])
    seconds = bench.interleaved(programs, repeats=repeats)
    return {candidates[int(number)]: statistics.median(s) for number, s in seconds.items()}
