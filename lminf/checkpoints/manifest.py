"""What a checkpoint of the training state says of itself: `manifest.json`, read without trust.

    step      the step that its folder is named by
    loss      what it was judged by, nats per token; null if it was not
    ...       facts about the run, as text
    files     name inside the folder -> [bytes, CRC-32]
    checksum  CRC-32 of all of the above; manifests from before it was kept have none

Whatever is not as it should be makes the checkpoint a damaged one, which has a name and a reason.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from etils import epath

NAME = "manifest.json"
BLOCK = 1 << 20  # bytes read at a time
CHECKSUM = "checksum"
Facts: TypeAlias = Mapping[str, str | None]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed, though it may have been damaged since."""

    path: epath.Path
    step: int
    loss: float | None = None
    facts: Facts = field(default_factory=dict)
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name -> bytes, CRC-32
    problem: str | None = None  # with the manifest; None if it can be believed

    def damage(self) -> str | None:
        """What is wrong with the manifest or with the files it names; None if nothing is."""
        if self.problem is not None:
            return self.problem
        try:
            return next(filter(None, (self._damage_of(name) for name in self.files)), None)
        except (OSError, ValueError) as error:  # ValueError: no name for a file
            return f"it cannot be read: {getattr(error, 'strerror', None) or error}"

    def _damage_of(self, name: str) -> str | None:
        size, expected = self.files[name]
        file = self.path / name
        if not file.exists():
            return f"{name} is missing"
        if not is_file(file):  # a named pipe would be waited for
            return f"{name} is not a file"
        if (length := file.stat().length) != size:
            return f"{name} has {length} bytes, not {size}"
        return None if checksum(file) == expected else f"the bytes of {name} have changed"


def write(path: epath.Path, *, step: int, loss: float | None, facts: Facts) -> None:
    """Completes the checkpoint in the folder `path`: its manifest appears at once."""
    content: dict[str, Any] = {
        "step": step,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        **facts,
        "files": {
            str(file.relative_to(path)): [file.stat().length, checksum(file)]
            for file in files_in(path)
        },
    }
    content[CHECKSUM] = _checksum_of(content)
    unfinished = path / f"{NAME}.writing"
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(path / NAME)


def read(path: epath.Path) -> Saved | None:
    """The checkpoint in the folder `path`; None if it has no manifest, so was not completed."""
    if not (path / NAME).exists():
        return None
    step = int(path.name)
    try:
        if not is_file(path / NAME):
            raise ValueError(f"{NAME} is not a file")
        try:
            content = json.loads((path / NAME).read_text(), parse_constant=_not_json)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{NAME} is not JSON") from error
        loss, facts, files = _parts(content, step)
        return Saved(path, step, loss, facts, files)
    except (ValueError, OSError) as error:
        return Saved(path, step, problem=str(error))


def _parts(
    content: Any, step: int
) -> tuple[float | None, dict[str, str | None], dict[str, tuple[int, int]]]:
    """Loss, facts and files of a manifest; ValueError for whatever is not as it should be."""
    if not isinstance(content, dict):
        raise ValueError(f"{NAME} holds no object")
    if CHECKSUM in content and content[CHECKSUM] != _checksum_of(content):
        raise ValueError(f"{NAME} has changed since it was written")
    if lost := {"step", "loss", "files"} - content.keys():
        raise ValueError(f"{NAME} lacks {', '.join(sorted(lost))}")
    if type(content["step"]) is not int or content["step"] != step:
        raise ValueError(f"{NAME} is of step {str(content['step'])[:40]!r}")
    loss = content["loss"]
    if loss is not None and (type(loss) not in (int, float) or not math.isfinite(loss)):
        raise ValueError(f"{NAME} has the loss {str(loss)[:40]!r}")
    facts = {k: v for k, v in content.items() if k not in ("step", "loss", "files", CHECKSUM)}
    for name, value in facts.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{NAME} has {name[:40]} = {str(value)[:40]!r}, which is no text")
    files = content["files"]
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{NAME} names no files")
    return loss, facts, {name: _listed(name, value) for name, value in files.items()}


def _listed(name: str, value: Any) -> tuple[int, int]:
    """Bytes and checksum of a file that lies inside the checkpoint's folder."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or {".", ".."} & set(name.split("/")) or "\0" in name:
        raise ValueError(f"{NAME} names {name[:60]!r}, which is not in its folder")
    match value:
        case [int(size), int(checksum)] if size >= 0 and bool not in map(type, value):
            return size, checksum
    raise ValueError(f"{NAME} has {str(value)[:40]!r} for {name[:60]!r}, not bytes and a checksum")


def _not_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checksum_of(content: Mapping[str, Any]) -> int:
    """Of everything in a manifest but its own checksum."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def is_file(path: epath.Path) -> bool:
    """Whether it is a regular file. Etils calls a named pipe one too, which a reader waits for."""
    name = os.fspath(path)
    return path.is_file() if "://" in name else os.path.isfile(name)


def files_in(path: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, in the order of their names."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            yield from files_in(entry)
        else:
            yield entry


def checksum(path: epath.Path) -> int:
    """CRC-32 of a file's bytes."""
    result = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            result = zlib.crc32(block, result)
    return result
