"""Small files of a checkpoint, which may come from anywhere: plain, bounded, objects of JSON."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lminf.errors import InputError
from lminf.ranges import shown

# Gemma's tokenizer.json, the largest of its kind, has 34 MB; the index of DeepSeek V3 has 9 MB, and
# what Python makes of JSON is up to twenty times as large.
MOST_TEXT_BYTES, MOST_JSON_BYTES = 64 << 20, 16 << 20


def read_text(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of a file of a checkpoint, without a byte order mark.

    Refuses what is no plain file (reading from a pipe never ends) and what is too large.
    """
    if not path.is_file():
        raise InputError(f"{path} is no plain file; fetch the checkpoint again, whole")
    if (size := path.stat().st_size) > most_bytes:
        raise InputError(
            f"{path} has {size / 2**20:.0f} MiB; no such file of a model has more than "
            f"{most_bytes >> 20} MiB: fetch it again"
        )
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error}); fetch it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(
            read_text(path, most_bytes=MOST_JSON_BYTES),
            object_pairs_hook=functools.partial(_unambiguous, path),
        )
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for a checkpoint; fetch it again") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, no object; fetch it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unambiguous(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values and values[name] != value:
            raise InputError(f"{path} has {shown(name)} twice; take one of them out")
        values[name] = value
    return values
