"""lminf show RUN…: what finished runs measured, from their rows.

RUN is a run's folder, or an experiment's name, which means its latest run below runs/. Runs of one
experiment share a table, with the settings that tell them apart in its first column.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from rich.console import Console

from lminf.errors import InputError
from lminf.run import folder, plots, tables
from lminf.run.folder import Row, RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or an experiment")
    parser.add_argument("--redraw", action="store_true", help="draw the figures again first")
    parser.add_argument("--rows", action="store_true", help="every row, not the summary")


def run(args: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    together: dict[str, list[RunFolder]] = {}
    for name in args.runs:
        found = folder.find(name)
        together.setdefault(found.experiment(), []).append(found)
    for experiment, runs in together.items():
        module = experiment_module(experiment)
        summary = None if args.rows else getattr(module, "table", None)
        console.print(f"{experiment or 'unnamed experiment'}", style="bold")
        console.print(tables.rich_table(combined(runs, summary)))
        for one in runs:
            if args.redraw:
                redraw(one, module, experiment)
            for path in sorted(one.plots.glob("*.png")):
                print(f"figure  {path}")
            print(f"rows    {one / 'rows.jsonl'}")


def combined(
    runs: Sequence[RunFolder], summary: Callable[[list[Row]], list[Row]] | None
) -> list[Row]:
    """The runs' tables below each other, under a column that says which run a line is from."""
    parts = []
    for one in runs:
        rows = one.rows()
        own = summary(rows) if summary and rows else rows
        parts += [{"run": one.title(), **row} for row in own] if len(runs) > 1 else own
    return parts


def experiment_module(name: str) -> ModuleType | None:
    """The experiment's module, which knows how to summarise and draw its rows; None if gone."""
    if not name or importlib.util.find_spec(f"experiments.{name}") is None:
        return None
    return importlib.import_module(f"experiments.{name}")


def redraw(one: RunFolder, module: ModuleType | None, experiment: str) -> None:
    if module is None or not hasattr(module, "plot"):
        raise InputError(f"{one.path} is of experiment {experiment!r}, which is not installed here")
    plots.write(one, module.plot(one.rows()), experiment)
