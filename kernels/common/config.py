"""Configs as JSON, and the key under which a tuned one is kept.

An implementation's config is a frozen dataclass named `Config` in its module; its fields are
numbers and strings.
"""

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PACKAGES = {
    "lambda_attention": "lminf.kernels.lambda_attention",
    "lambda_decode": "lminf.kernels.decode",
    "block_sparse_attention": "lminf.kernels.block_sparse",
    "linear_cross_entropy": "lminf.kernels.cross_entropy",
}


@dataclass(frozen=True)
class Key:
    """What a tuned config depends on. The loss has rows, vocabulary and D as T, S and H."""

    op: str
    dtype: str
    heads: int
    key_heads: int
    width: int
    queries: int
    keys: int
    window: int
    num_global: int

    def __str__(self) -> str:
        queries, keys = (math.ceil(math.log2(max(n, 1))) for n in (self.queries, self.keys))
        window = min(self.window, self.keys)  # longer windows see no more
        return (
            f"{self.op} {self.dtype} N{self.heads} K{self.key_heads} H{self.width} "
            f"T2^{queries} S2^{keys} w{window} g{self.num_global}"
        )


def config_class(op: str, implementation: str) -> type | None:
    """The Config of an implementation; None if it has nothing to configure."""
    module = importlib.import_module(f"{PACKAGES[op]}.{implementation}")
    return getattr(module, "Config", None)


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config."""
    return dataclasses.asdict(config)


def from_json(op: str, implementation: str, fields: Mapping[str, Any]) -> Any:
    """The config with these fields; ValueError if the implementation has no such fields."""
    made = config_class(op, implementation)
    known = {f.name for f in dataclasses.fields(made)} if made is not None else set()
    if made is None or not fields.keys() <= known:
        raise ValueError(
            f"{op}, {implementation}: config has {sorted(fields)}, not {sorted(known)}"
        )
    return made(**fields)


def neighbours(config: Any) -> Iterator[Any]:
    """Configs with one number halved or doubled; counts of stages go up and down by one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        candidates = (value - 1, value + 1) if "stages" in field.name else (value // 2, value * 2)
        for candidate in candidates:
            if candidate >= 1:
                yield dataclasses.replace(config, **{field.name: candidate})
