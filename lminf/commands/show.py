"""lminf show RUN…: what finished runs measured, from their rows.

RUN is a run's folder, or an experiment's name, which means its latest run below runs/. Runs of one
experiment share a table, with the settings that tell them apart in its first column. Where files of
a run are damaged, what can be read is shown, and a warning at the end says what could not. Where a
run has no row that can be read, or its figures are not drawn as asked, that is an error.
"""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

from matplotlib.figure import Figure
from rich.console import Console

from lminf.errors import InputError, printable
from lminf.run import folder, header, plots, report, tables
from lminf.run.folder import Row, RunFolder

COMMAND = re.compile(r"(?:python -m experiments\.|lminf run )(\w+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or an experiment")
    parser.add_argument(
        "--redraw", action="store_true", help="draw the figures and the report's table again first"
    )
    parser.add_argument("--rows", action="store_true", help="every row, not the summary")


def run(args: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    together: dict[str, list[Reading]] = {}
    for name in args.runs:
        result = read(name)
        together.setdefault(result.experiment, []).append(result)
    damage: list[str] = []
    for experiment, runs in together.items():
        console.print(printable(experiment) or "unnamed experiment", style="bold")
        console.print(tables.rich_table(combined(runs, summarise=not args.rows)))
        for one in runs:
            if args.redraw:
                redraw(one)
            for path in sorted(one.run.plots.glob("*.png")):
                print(f"figure  {printable(str(path))}")
            print(f"rows    {printable(str(one.run / 'rows.jsonl'))}")
            damage += one.damage
    if damage:
        said = "; ".join(damage[:3]) + (f"; and {len(damage) - 3} more" if damage[3:] else "")
        if args.redraw or not all(one.rows for runs in together.values() for one in runs):
            raise InputError(said)
        print(f"warning: {printable(said)}", file=sys.stderr)


@dataclass
class Reading:
    """What could be read of a run's folder, and sentences on what could not."""

    run: RunFolder
    experiment: str
    title: str
    rows: list[Row]
    damage: list[str] = field(default_factory=list)

    @cached_property
    def module(self) -> ModuleType | None:
        """The experiment's module, which knows how to summarise and draw its rows; None if gone."""
        return (
            importlib.import_module(f"lminf.experiments.{self.experiment}") if self.known else None
        )

    @property
    def known(self) -> bool:
        return bool(self.experiment) and _experiment_of(self.experiment) == self.experiment

    def summary(self) -> list[Row]:
        """The experiment's own table of the rows; the rows themselves where it has none."""
        table = getattr(self.module, "table", None)
        if table is None or not self.rows:
            return self.rows
        try:
            lines = table(self.rows)
        except Exception as error:  # rows of another experiment, or damaged ones
            self.damage.append(
                f"the rows of {self.run.path} are not those of {self.experiment} "
                f"({folder.row_problem(error)}); they are shown as they are"
            )
            return self.rows
        return lines

    def figures(self) -> Mapping[str, Figure]:
        """The experiment's figures of the rows, by file stem."""
        if not self.experiment:
            raise InputError(
                f"{self.run.path} does not say which experiment it is of; name the folder after "
                f"it, as in passkey or passkey_short"
            )
        if self.module is None or not hasattr(self.module, "plot"):
            raise InputError(
                f"{self.run.path} is of experiment {self.experiment!r}, which is not installed here"
            )
        try:
            drawn = self.module.plot(self.rows)
        except Exception as error:
            raise self.undrawable(error) from error
        return {self.experiment: drawn} if isinstance(drawn, Figure) else drawn

    def undrawable(self, error: Exception) -> InputError:
        return InputError(
            f"cannot draw the rows of {self.run.path} as figures of {self.experiment} "
            f"({folder.row_problem(error)}); its figures are as they were"
        )


def read(name: str) -> Reading:
    """The run in the folder `name`, or the latest of that experiment, as far as it can be read."""
    run = folder.find(name)
    damage: list[str] = []

    def settings(file: str) -> Mapping[str, object]:
        if not (run / file).exists():  # kept results are without some
            return {}
        try:
            return run.read_object(file)
        except InputError as error:
            damage.append(str(error))
            return {}

    environment, overrides, _ = map(settings, ("environment.json", "overrides.json", "config.json"))
    try:
        rows, lines = folder.scan_lines(run / "rows.jsonl")
    except InputError as error:
        rows, lines = [], [str(error)]
    if lines:
        more = f" and {len(lines) - 1} more lines are not" if len(lines) > 1 else ""
        damage.append(f"{lines[0]}{more}")
    experiment = environment.get("experiment", "")
    if not isinstance(experiment, str):
        damage.append(f"{run / 'environment.json'} names no experiment")
        experiment = ""
    # Kept results are called after their experiment, or EXPERIMENT_VARIANT.
    folder_name = run.path.resolve().name
    if not experiment:
        names = (folder_name, _reported(run))
        experiment = next(filter(None, map(_experiment_of, names)), "")
    experiment = _experiment_of(experiment) or experiment
    variant = environment.get("variant")
    changed = [f"{key}={value}" for key, value in overrides.items()]
    title = " ".join([*([str(variant)] if variant else []), *changed]) or folder_name
    return Reading(run, experiment, title, rows, damage)


def _reported(run: RunFolder) -> str:
    """The experiment of the command in a run's report."""
    path = run / "report.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    command = COMMAND.search(text)
    return command[1] if command else ""


def _experiment_of(name: str) -> str | None:
    """The installed experiment of that name, or of its beginning: `passkey` of `passkey_long`."""
    while name:
        public = name.isidentifier() and not name.startswith("_")
        if public and importlib.util.find_spec(f"lminf.experiments.{name}") is not None:
            return name
        name = name.rpartition("_")[0]
    return None


def combined(runs: Sequence[Reading], *, summarise: bool) -> list[Row]:
    """The runs' tables below each other, under a column that says which run a line is from."""
    parts = []
    for one in runs:
        lines = one.summary() if summarise else one.rows
        parts += [{"run": one.title, **row} for row in lines] if len(runs) > 1 else lines
    return parts


def redraw(one: Reading) -> None:
    """Draws the figures and the report's table again; leaves both if any row cannot be read."""
    if not one.rows and not one.damage:
        one.damage.append(
            f"{one.run / 'rows.jsonl'} holds no row to draw; run the experiment first"
        )
        return
    if one.damage:
        one.damage[-1] += "; its figures are as they were"
        return
    figures = one.figures()
    try:
        files = {f"{stem}.{kind}": plots.save(figure, kind)
                 for stem, figure in figures.items() for kind in plots.KINDS}  # fmt: skip
    except Exception as error:
        raise one.undrawable(error) from error
    for name, content in files.items():
        one.run.write(f"plots/{name}", content)
    written = one.run / "report.md"
    if written.is_file():
        text = written.read_text(encoding="utf-8", errors="surrogateescape")
        pictures = [f"plots/{path.name}" for path in one.run.plots.glob("*.png")]
        config = header.CONFIGS / f"{one.experiment}.py"
        new = report.with_results(
            text, header=header.read(config), table=one.summary(), figures=pictures
        )
        one.run.write("report.md", new.encode(errors="surrogateescape"))
