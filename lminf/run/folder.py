"""One folder per run: what was asked, on what machine, what was measured.

    config.json       the resolved configuration
    config.py         the config file, verbatim
    overrides.json    what the command line changed
    environment.json  versions, devices, commit, uncommitted diff, command
    rows.jsonl        one measured cell per line
    metrics.jsonl     values over time
    plots/            figures, drawn from rows.jsonl alone
    report.md         question, command, table, figure, hardware, time

Whole files appear by a rename, so a reader never sees half of one; the two .jsonl files grow by
whole lines.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf.atomic import atomic_write, check_regular, disk_errors, read_bytes
from lminf.config import closest
from lminf.errors import InputError, printable
from lminf.run import environment

CREATED = ("config.json", "config.py", "overrides.json", "environment.json", "plots")
LOCK = "lock"  # held by the process that writes here (lminf.run.lock)
Row = dict[str, Any]  # column -> str, int, finite float, bool or None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one JSON line, flushed; NaN, infinities and nested values are refused."""
    line = json.dumps({key: _scalar(key, value) for key, value in row.items()}, allow_nan=False)
    data = (line + "\n").encode()
    if path.exists():
        check_regular(path)  # opening a pipe would wait for its reader
    with disk_errors(path), open(path, "ab+", buffering=0) as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":  # an editor left it out
                data = b"\n" + data
        try:
            # A full disk can accept part of a line without an error.
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the disk is full")
        except BaseException:
            os.truncate(path, end)
            raise


def read_lines(path: Path) -> list[Row]:
    """The rows of a .jsonl file; none if there is no such file."""
    rows, damage = scan_lines(path)
    if damage:
        raise InputError(f"{damage[0]}; delete that line")
    return rows


def scan_lines(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a .jsonl file that can be read, and what is wrong with the other lines."""
    if not path.exists():
        return [], []
    rows, damage = [], []
    # Not splitlines(): that also breaks at the line separators inside texts.
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(_row(json.loads(line.decode(), parse_constant=_no_number)))
            except (ValueError, RecursionError) as error:
                damage.append(f"line {number} of {path} is not a row ({brief(error)})")
    return rows, damage


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    for name, cell in value.items():
        if isinstance(cell, (dict, list)):
            raise ValueError(f"the column {name[:40]!r} is no single value")
        if isinstance(cell, float) and not math.isfinite(cell):
            raise ValueError(f"the column {name[:40]!r} is infinite")
        if isinstance(cell, int) and abs(cell) >= 2**63:  # more than an array holds
            raise ValueError(f"the column {name[:40]!r} has more than 63 bits")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no measurement")


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def brief(error: BaseException) -> str:
    """What a library said, on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "…"


def row_problem(error: Exception) -> str:
    """What an error that reading rows ended in says about them."""
    if isinstance(error, KeyError) and error.args:
        return f"there is no {printable(str(error.args[0]))[:40]!r} in a row"
    return printable(brief(error))


def _scalar(column: str, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a NumPy or JAX scalar
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"the measured {column} is {value}, which is no measurement; "
            "leave the cell out of the rows, or find out what overflowed"
        )
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise TypeError(f"column {column!r} holds {type(value).__name__}: one scalar per cell")
    return value


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. It is an os.PathLike, and hands out the paths inside it."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    def append_row(self, row: Mapping[str, Any]) -> None:
        append_line(self.path / "rows.jsonl", row)

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        append_line(self.path / "metrics.jsonl", {"step": step, **values})

    def rows(self) -> list[Row]:
        return read_lines(self.path / "rows.jsonl")

    def metrics(self) -> list[Row]:
        return read_lines(self.path / "metrics.jsonl")

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes a whole file (folders in `name` are made); returns its path."""
        path = self.path / name
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def keep_until(self, step: int) -> None:
        """Drops the rows and metrics of later steps, which a resumed run measures again."""
        for name in ("rows.jsonl", "metrics.jsonl"):
            self.keep(lambda line: line.get("step", 0) <= step, of=name)

    def keep(self, predicate: Callable[[Row], bool], *, of: str = "rows.jsonl") -> None:
        """Drops the other lines of that file."""
        lines = read_lines(self.path / of)
        kept = [line for line in lines if predicate(line)]
        if len(kept) < len(lines):
            self.write(of, "".join(json.dumps(line) + "\n" for line in kept))

    def read_json(self, name: str) -> Any:
        path = self.path / name
        if not path.exists():
            raise InputError(f"cannot read {path} (there is no such file); is it a run?")
        try:
            return json.loads(_content(path).decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"cannot read {path} ({brief(error)}); is it a run?") from error

    def read_object(self, name: str) -> dict[str, Any]:
        """What a .json file of settings holds, which is an object."""
        value = self.read_json(name)
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise InputError(f"{self.path / name} holds {kind}, not an object; is it a run?")
        return value

    def undo(self, before: frozenset[str] | None) -> bool:
        """Takes back what `create` made, if nothing else has appeared since; whether it did.

        `before` are the names that the folder held before the call; None: there was no folder.
        """
        names = {entry.name for entry in self.path.iterdir()}
        made = names - (before or frozenset())
        if not made or not made <= {*CREATED, LOCK} or (before and "config.json" in before):
            return False
        if (self.plots.exists() and any(self.plots.iterdir())) or self.plots.is_symlink():
            return False
        with disk_errors(self.path):
            for name in made:
                (self.path / name).rmdir() if name == "plots" else (self.path / name).unlink()
            if before is None:
                self.path.rmdir()
        return True

    def write_json(self, name: str, value: Any) -> Path:
        return self.write(name, json.dumps(value, indent=2) + "\n")


def create(
    experiment: str,
    *,
    variant: str,
    config: Mapping[str, Any],
    config_source: str,
    overrides: Mapping[str, Any],
    command: Sequence[str],
    at: Path | None = None,
    resume: bool = False,
    may_change: Sequence[str] = (),
) -> RunFolder:
    """A new run folder with everything that is known before the run.

    At `at`, which must be new or empty (or, with `resume`, hold a run of this configuration, which
    then goes on; settings that `may_change`, by their name or their section's, are not compared),
    else at runs/<experiment>/<date-time>-<short>, where
    `short` is the start of a digest of `config`: equal settings end alike.
    """
    resolved = json.dumps(config, indent=2) + "\n"
    short = hashlib.sha256(resolved.encode()).hexdigest()[:6]
    if at is None:
        path = _new_folder(runs_of(experiment), short)
    else:
        path = _claim(at, resolved if resume else None, may_change)
    folder = RunFolder(path)
    folder.write("config.json", resolved)
    folder.write("config.py", config_source)
    folder.write_json("overrides.json", dict(overrides))
    facts = {"experiment": experiment, "variant": variant, **environment.describe(command)}
    folder.write_json("environment.json", facts)
    with disk_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    return folder


def runs_of(experiment: str) -> Path:
    """Where runs lie that are given no folder."""
    return Path("runs") / experiment


def find(name: str, *, runs: Path = Path("runs")) -> RunFolder:
    """The run in the folder `name`, or the latest run of the experiment `name` below `runs`."""
    try:
        for kept in ("environment.json", "rows.jsonl"):
            if (Path(name) / kept).is_file():
                return RunFolder(Path(name))
        # The names of runs start with the time.
        latest = sorted((runs / name).glob("*/environment.json")) if name else []
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{name!r} is no folder's name ({brief(error)})") from error
    if latest:
        return RunFolder(latest[-1].parent)
    known = [path.name for path in runs.glob("*") if path.is_dir()]
    meant = closest(name, known) if known else "run an experiment first"
    raise InputError(f"{name!r} is no run's folder and {runs}/ holds no run of it; {meant}")


def _claim(path: Path, same: str | None, may_change: Sequence[str]) -> Path:
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if not entries:
        return path
    if same is None or "config.json" not in entries:
        raise InputError(f"{path} already holds files; name a new or empty folder with --out")
    stored, now = RunFolder(path).read_json("config.json"), json.loads(same)
    changed = difference(stored, now, may_change=may_change)
    if changed:
        raise InputError(
            f"{path} holds a run with {changed}; give it the same settings to go on with it, or "
            f"name a new folder with --out"
        )
    return path


def difference(old: Any, new: Any, *, may_change: Sequence[str] = ()) -> str | None:
    """The first setting of two configurations that differs, as `field=old, not new`."""
    earlier, later = dict(_leaves(old)), dict(_leaves(new))
    for name in {**earlier, **later}:
        sections = [name[:index] for index, letter in enumerate(name) if letter == "."]
        if earlier.get(name) != later.get(name) and not {name, *sections} & set(may_change):
            return f"{name}={earlier.get(name)!r}, not {later.get(name)!r}"
    return None


def _leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting of a configuration as JSON."""
    if not isinstance(settings, dict):
        yield prefix[:-1], settings
    else:
        for key, value in settings.items():
            yield from _leaves(value, f"{prefix}{key}.")


def _new_folder(parent: Path, short: str) -> Path:
    name = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{short}"
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{count}" for count in range(2, 100))):
            with contextlib.suppress(FileExistsError):  # two runs in one second
                (parent / (name + suffix)).mkdir()
                return parent / (name + suffix)
    raise InputError(f"{parent} holds a hundred runs called {name}; name a folder with --out")
