"""Sweeps: many cells, each a few overrides of one config, run once by any number of workers.

    grid({"rate": (1e-3, 2e-3), "seed": (0, 1)})     every combination: four cells
    zipped({"width": (64, 128), "layers": (2, 4)})   side by side: two cells
    chain(a, b)                                      the cells of a, then those of b
    cross(a, b)                                      every cell of a with every cell of b

A config file that can be swept has get_sweep(config, variant) beside get_config: it returns such
cells. The folder of a sweep holds

    config.json       the base configuration and the overrides of every cell
    cells/<key>/      the run of one cell; `key` is a digest of its resolved config
    rows.jsonl        rows of all finished cells, with their overrides as columns

A worker holds a cell's folder by a lock that dies with it, so what a killed worker had begun is
free for the next one, which starts that cell anew. A cell counts when its done.json is there.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from lminf.config import closest
from lminf.errors import InputError
from lminf.run import folder, lock, request, settings
from lminf.run.folder import Row, RunFolder
from lminf.run.request import Request

Overrides: TypeAlias = Mapping[str, Any]  # dotted field -> value
Run: TypeAlias = Callable[[ConfigDict, RunFolder], Iterator[Row]]
DONE, FAILED = "done.json", "failed.json"
# The files of a cell that a new attempt writes again; whatever else is in its folder stays.
WRITTEN = (
    "config.json", "overrides.json", "environment.json", "rows.jsonl", "metrics.jsonl", FAILED,
)  # fmt: skip


# --- The algebra ----------------------------------------------------------------------------------


def grid(axes: Mapping[str, Iterable[Any]]) -> tuple[Overrides, ...]:
    """Every combination of the values; the last axis varies fastest."""
    return cross(*(zipped({name: values}) for name, values in axes.items()))


def zipped(axes: Mapping[str, Iterable[Any]]) -> tuple[Overrides, ...]:
    """The values side by side: the n-th cell has the n-th of each."""
    columns = {name: tuple(values) for name, values in axes.items()}
    if len({len(values) for values in columns.values()}) > 1:
        sizes = ", ".join(f"{name} has {len(values)}" for name, values in columns.items())
        raise InputError(f"values side by side must be as many for each field, but {sizes}")
    return tuple(
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    )


def chain(*sweeps: Sequence[Overrides]) -> tuple[Overrides, ...]:
    """The cells of one sweep after those of another."""
    return tuple(itertools.chain(*sweeps))


def cross(*sweeps: Sequence[Overrides]) -> tuple[Overrides, ...]:
    """Every cell of one sweep with every cell of the others."""
    return tuple(_joined(parts) for parts in itertools.product(*sweeps))


def _joined(parts: Iterable[Overrides]) -> Overrides:
    cell: dict[str, Any] = {}
    for part in parts:
        twice = cell.keys() & part.keys()
        if twice:
            raise InputError(f"{', '.join(sorted(twice))} is set by two sweeps that are crossed")
        cell |= part
    return cell


# --- Cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep."""

    overrides: Overrides
    config: ConfigDict
    key: str  # digest of the experiment and the resolved config

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.overrides.items()) or "base"


@dataclass(frozen=True)
class Shard:
    """Where a worker begins: at the cells whose number leaves `index` when divided by `of`."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        index, slash, of = text.partition("/")
        if not slash or not index.isdigit() or not of.isdigit() or not int(index) < int(of):
            raise InputError(f"--shard={text}: write i/n with i from 0 to n - 1, as in 0/4")
        return cls(int(index), int(of))

    def order(self, cells: Sequence[Cell]) -> list[Cell]:
        """This worker's own cells, then those of the others, which may have died."""
        return sorted(cells, key=lambda cell: (cells.index(cell) - self.index) % self.of)


def cells_of(run_request: Request) -> tuple[Cell, ...]:
    """The cells that the config file asks for, with the overrides of the command line below them.

    InputError where a cell names no field or gives it a value of another type, where two cells are
    one, and where there is none.
    """
    module = request.load_module(run_request.config_path)
    if not hasattr(module, "get_sweep"):
        raise InputError(
            f"{run_request.config_path} has no get_sweep(config, variant), so there is nothing to "
            f"sweep"
        )
    cells: dict[str, Cell] = {}
    with request.defects_of(run_request.config_path, f"get_sweep(config, {run_request.variant!r})"):
        listed = list(module.get_sweep(run_request.config, run_request.variant))
    for overrides in listed:
        if not isinstance(overrides, Mapping):
            raise InputError(
                f"get_sweep of {run_request.config_path} gives {overrides!r:.60} as a cell; give "
                f"dictionaries from a field's name to its value"
            )
        config = overridden(run_request.config, overrides, experiment=run_request.experiment)
        resolved = json.dumps([run_request.experiment, request.to_dict(config)], sort_keys=True)
        key = hashlib.sha256(resolved.encode()).hexdigest()[:12]
        cell = Cell(dict(overrides), config, key)
        if key in cells:
            raise InputError(f"two cells are the same run: ({cells[key]}) and ({cell})")
        cells[key] = cell
    if not cells:
        raise InputError(
            f"the sweep of {run_request.config_path} has no cells; give every axis a value"
        )
    for name in run_request.overrides:
        if all(name in cell.overrides for cell in cells.values()):
            raise InputError(
                f"--config.{name}: every cell of this sweep sets {name} itself, so nothing would "
                f"read it; leave it out, or change get_sweep of {run_request.config_path}"
            )
    return tuple(cells.values())


def overridden(base: ConfigDict, overrides: Overrides, *, experiment: str) -> ConfigDict:
    """A copy of the config with some fields changed, each to a value of the type that it had."""
    config = base.copy_and_resolve_references()
    fields = dict(request.leaves(config))
    for name, value in overrides.items():
        if name not in fields:
            raise InputError(f"the config has no field {name!r}; {closest(name, fields)}")
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a cell sets {name}={value!r}, but the config file has {fields[name]!r}: {error}"
            ) from error
    settings.check(config, experiment=experiment)
    return config


# --- Running --------------------------------------------------------------------------------------


def create(run_request: Request, cells: Sequence[Cell], command: Sequence[str]) -> RunFolder:
    """The sweep's folder: `--out`, or one that the same sweep finds again."""
    name = "-".join(filter(None, (run_request.experiment, run_request.variant)))
    path = run_request.out or Path("runs") / "sweeps" / name
    with lock.held(path, wait=True):  # workers that start together write the same files
        return folder.create(
            run_request.experiment,
            variant=run_request.variant,
            config={
                "base": run_request.resolved(),
                "cells": {cell.key: _plain(cell.overrides) for cell in cells},
            },
            config_source=run_request.config_path.read_text(encoding="utf-8"),
            overrides=run_request.overrides,
            command=command,
            at=path,
            resume=True,
        )


@dataclass
class Tally:
    """What became of the cells while one worker ran."""

    ran: int = 0
    found_done: int = 0
    elsewhere: list[str] = dataclasses.field(default_factory=list)  # why they were left alone
    failed: list[str] = dataclasses.field(default_factory=list)


def work(
    out: RunFolder,
    run_request: Request,
    cells: Sequence[Cell],
    run: Run,
    *,
    shard: Shard,
    say: Callable[[str], None],
) -> Tally:
    """Runs every cell that nobody has finished or holds; a cell that fails does not stop others."""
    tally = Tally()
    for cell in shard.order(cells):
        cell_path = cell_folder(out, cell)
        if (cell_path / DONE).exists():
            tally.found_done += 1
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.held(cell_path.path))
            except InputError as busy:
                tally.elsewhere.append(str(busy))
                continue
            if (cell_path / DONE).exists():  # finished by another since
                tally.found_done += 1
                continue
            say(f"{cell}")
            started, processor = time.monotonic(), time.process_time()
            try:
                count = _run_cell(cell_path, run_request, cell, run)
            except Exception as error:
                if isinstance(error, OSError):
                    raise  # a full disk fails every cell
                cell_path.write_json(FAILED, {"error": f"{type(error).__name__}: {error}"})
                tally.failed.append(f"({cell}): {error}")
                say(f"  failed: {error}")
                continue
            spent = {
                "seconds": time.monotonic() - started,
                "cpu_seconds": time.process_time() - processor,  # of all cores, paused time aside
            }
            cell_path.write_json(DONE, {"rows": count, **spent})
            tally.ran += 1
    return tally


def _run_cell(out: RunFolder, run_request: Request, cell: Cell, run: Run) -> int:
    """The number of rows; what an earlier worker left half done is dropped first."""
    for name in WRITTEN:
        out.path.joinpath(name).unlink(missing_ok=True)
    if (out / "checkpoints").exists():  # of the attempt whose rows are gone; may be large or wanted
        begun = sorted(out.path.glob("checkpoints.interrupted*"))
        out.path.joinpath("checkpoints").rename(out / f"checkpoints.interrupted-{len(begun) + 1}")
    out.write_json("config.json", request.to_dict(cell.config))
    out.write_json("overrides.json", _plain(cell.overrides))
    out.write_json(
        "environment.json", {"experiment": run_request.experiment, "variant": run_request.variant}
    )
    count = 0
    for row in run(cell.config, out):
        out.append_row(row)
        count += 1
    return count


def cell_folder(out: RunFolder, cell: Cell) -> RunFolder:
    return RunFolder(out / "cells" / cell.key)


def finished(out: RunFolder, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if (cell_folder(out, cell) / DONE).exists()]


def collect(out: RunFolder, cells: Sequence[Cell]) -> list[Row]:
    """Rows of the finished cells in the order of the sweep, also written to its rows.jsonl."""
    rows = []
    for cell in finished(out, cells):
        cell_path = cell_folder(out, cell)
        columns = {"cell": cell.key, **_scalars(cell.overrides)}
        rows += [{**columns, **row} for row in cell_path.rows()]
    out.write("rows.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return rows


def _plain(overrides: Overrides) -> dict[str, Any]:
    return {name: request.to_dict(value) for name, value in overrides.items()}


def _scalars(overrides: Overrides) -> Row:
    """Values that can stand in a row; a tuple is written out."""
    plain = (str, int, bool, type(None))
    return {
        name: value
        if isinstance(value, plain) or (isinstance(value, float) and math.isfinite(value))
        else str(value)
        for name, value in overrides.items()
    }
