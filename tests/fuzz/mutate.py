"""Seeded damage to a file: bytes flipped, cut, repeated or inserted; values of JSON exchanged."""

import json
import random
from pathlib import Path
from typing import Any

# What readers forget: limits of integers, numbers that are none, types that nearly fit.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**400, 1e308, -1e308, 1e-320, 0.5, float("nan"), float("inf"), float("-inf"),
    "", "0", "-1", "nan", "true", "x" * 5000, "../x", "/etc/passwd", "\x00", "\x1b[31m", "\ud800",
    "{{ 1 / 0 }}", [], {}, [[]], [None], {"": None}, [1, "a", {}], {"type": None},
)  # fmt: skip
ODD_BYTES = (
    b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff" * 8, b"\x00" * 8,
    *((2**bits - 1).to_bytes(bits // 8 + 1, "little") for bits in (31, 63)), b"\x00\x00\x00\x10",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\r\n", b"\n", b",", b'"', b"{", b"]", b"\\u0000",
    b"1e999", b"-1", b"NaN", b"null",
)  # fmt: skip


def mutate(rng: random.Random, path: Path) -> None:
    """Damages one file of the input in one to four places."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice(files)
    chance = rng.random()
    if chance < 0.02 and path.is_dir():
        file.unlink()
        return
    data = file.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        data = change_json(rng, data) if rng.random() < 0.7 else change_bytes(rng, data)
    file.write_bytes(data)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one place changed; headers, at the start, more often than the rest."""
    size = len(data)
    start = rng.randrange(min(size, rng.choice((32, 512, size or 1))) + 1) if size else 0
    length = rng.choice((0, 1, 1, 2, 4, 8, rng.randrange(64)))
    kind = rng.randrange(5)
    if kind == 0:  # overwritten
        odd = rng.choice(ODD_BYTES)
        return data[:start] + odd + data[start + len(odd) :]
    if kind == 1:  # inserted
        return data[:start] + rng.choice(ODD_BYTES) + data[start:]
    if kind == 2:  # removed
        return data[:start] + data[start + length :]
    if kind == 3:  # cut short
        return data[: rng.randrange(size + 1)]
    flipped = bytearray(data)
    if flipped:
        flipped[min(start, size - 1)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """One value of a JSON document, or of one of its lines, exchanged; other bytes are damaged."""
    lines = data.splitlines(keepends=True)
    try:
        return dumps(change_value(rng, json.loads(data)))
    except (ValueError, RecursionError):
        pass
    if lines:
        index = rng.randrange(len(lines))
        try:
            lines[index] = dumps(change_value(rng, json.loads(lines[index]))) + b"\n"
        except (ValueError, RecursionError):
            return change_bytes(rng, data)
        return b"".join(lines)
    return change_bytes(rng, data)


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def change_value(rng: random.Random, value: Any) -> Any:
    """The value with one part of it, at any depth, exchanged, removed, added or repeated."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return odd_value(rng, value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    chance = rng.random()
    if chance < 0.08:
        del value[key]
    elif chance < 0.14 and isinstance(value, dict):
        value[rng.choice((f"{key}_", key.upper(), "", "type", "model_type"))] = value[key]
    elif chance < 0.18 and isinstance(value, list):
        value.extend(value[: rng.choice((1, len(value)))])
    else:
        value[key] = change_value(rng, value[key])
    return value


def odd_value(rng: random.Random, value: Any) -> Any:
    """Something else in a value's place: often of its own type, and just out of its range."""
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (-value, value + 1, value - 1, value * 2, value * 1000, str(value), [value])
        )
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value[:-1], value + value, value.upper(), f" {value}", f"{value}\x00"))
    return rng.choice(ODD_VALUES)
