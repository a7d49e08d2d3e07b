"""From a command line to a run folder: what every experiment does before and after its question.

def run(config, out): yields rows          values -> measurements; `out` is the run's folder
def plot(rows): returns a figure           or a dictionary of them, by file stem
def table(rows): returns rows              what to print; optional

if __name__ == "__main__":
    main(run, plot, table=table)

An experiment that `resumes` goes on when its command is given again with the same --out; `before`
runs once the config is read and before JAX starts, which is when processes join each other.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lminf.atomic import disk_errors
from lminf.checkpoints import fetch
from lminf.errors import InputError
from lminf.run import (
    devices,
    environment,
    exits,
    folder,
    header,
    lock,
    plots,
    report,
    request,
    tables,
)
from lminf.run.folder import Row, RunFolder
from lminf.run.request import Request

Run = Callable[[Any, RunFolder], Iterator[Row]]
Plot = Callable[[list[Row]], Figure | Mapping[str, Figure]]
TableOf = Callable[[list[Row]], list[Row]]


def main(
    run: Run,
    plot: Plot,
    *,
    table: TableOf | None = None,
    resumes: bool = False,
    may_change: Sequence[str] = (),
    before: Callable[[Any], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, runs, and leaves rows, figures and a report; exits the process."""
    devices.configure(fetch.compiled_folder())
    arguments = sys.argv[1:] if argv is None else list(argv)
    with exits.orderly(debug="--debug" in arguments):
        asked = request.parse(Path(inspect.getfile(run)).stem, arguments)
        if asked is None:  # --help
            return
        if before is not None:
            before(asked.config)
        if not resumes:
            measure(asked, run, plot, table)
        elif leads():
            names = names_in(asked.out)
            with holding(asked):
                measure(asked, run, plot, table, names=names, resumes=True, may_change=may_change)
        else:
            assist(asked, run)


def leads() -> bool:
    """Whether this is the process that writes the run's files."""
    import jax

    return jax.process_index() == 0


def assist(asked: Request, run: Run) -> None:
    """Takes part in a run that another process writes down."""
    if asked.out is None:
        raise InputError("several processes share one folder; name it with --out")
    for _ in run(asked.config, RunFolder(asked.out)):
        pass


def names_in(out: Path | None) -> frozenset[str] | None:
    """What the folder holds before the call; None if there is none."""
    if out is None or not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out} is not a folder; name another one with --out")
    return frozenset(entry.name for entry in out.iterdir())


@contextlib.contextmanager
def holding(asked: Request) -> Iterator[None]:
    """Holds the folder that was asked for; a new one of its own name nobody else can want."""
    if asked.out is None:
        yield
        return
    with disk_errors(asked.out):
        asked.out.mkdir(parents=True, exist_ok=True)
    unlocked = not (asked.out / folder.LOCK).exists()
    with lock.held(asked.out):
        try:
            yield
        except InputError:
            # Somebody's folder, which is not a run: only the lock was put there.
            if unlocked and asked.out.exists() and not (asked.out / "config.json").exists():
                (asked.out / folder.LOCK).unlink(missing_ok=True)
            raise


def measure(
    asked: Request,
    run: Run,
    plot: Plot,
    table: TableOf | None,
    *,
    names: frozenset[str] | None = None,
    resumes: bool = False,
    may_change: Sequence[str] = (),
) -> RunFolder:
    """Runs to the end, or leaves what was measured until then; returns the folder.

    `names` are what the folder held before the call, which stays whatever happens.
    """
    if not resumes:
        names = names_in(asked.out)
    out = folder.create(
        asked.experiment,
        variant=asked.variant,
        config=asked.resolved(),
        config_source=asked.config_path.read_text(encoding="utf-8"),
        overrides=asked.overrides,
        command=environment.command_line(),
        at=asked.out,
        resume=resumes,
        may_change=may_change,
    )
    started, before = time.monotonic(), out.rows()

    def nothing_new() -> bool:
        """The run was finished by an earlier call, whose report stays."""
        return bool(before) and out.rows() == before and complete(out)

    try:
        for row in run(asked.config, out):
            out.append_row(row)
    except BaseException as failure:
        if not nothing_new():
            spent = time.monotonic() - started
            keep_what_there_is(out, asked, failure, names, seconds=spent, resumes=resumes)
        raise
    seconds = time.monotonic() - started
    rows = out.rows()
    shown = table(rows) if table else rows
    figures = plots.write(out, plot(rows), asked.experiment)
    if not nothing_new():
        spent = (
            f" in the last of several calls, which found {len(before)} of {len(rows)} rows there"
        )
        write_report(
            out, asked, table=shown, figures=figures, seconds=seconds, spent=spent if before else ""
        )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(tables.rich_table(shown))
    for path in [*figures, "report.md", "rows.jsonl"]:
        print(out / path)
    return out


INCOMPLETE = "what follows is incomplete."


def complete(out: RunFolder) -> bool:
    """Whether its report is of a run that came to its end."""
    written = out / "report.md"
    return written.exists() and INCOMPLETE not in written.read_text(encoding="utf-8")


def keep_what_there_is(
    out: RunFolder,
    asked: Request,
    failure: BaseException,
    names: frozenset[str] | None,
    *,
    seconds: float,
    resumes: bool,
) -> None:
    """A report without figures, for which the rows may not be enough; nothing if nothing ran."""
    rows = out.rows()
    if isinstance(failure, InputError) and not rows and not out.metrics() and out.undo(names):
        return
    how = "Interrupted" if isinstance(failure, KeyboardInterrupt) else f"Failed ({failure})"
    state = f"**{how} after {len(rows)} rows: {INCOMPLETE}**"
    write_report(out, asked, table=rows, figures=[], seconds=seconds, state=state)
    if not rows:
        print(f"no row was measured; {out / 'report.md'} says why", file=sys.stderr)
        return
    after = (
        f"the same command with --out={out.path} goes on from there"
        if resumes
        else "this experiment cannot go on from there: begin again in another folder"
    )
    print(f"{len(rows)} rows are in {out / 'rows.jsonl'}; {after}", file=sys.stderr)


def write_report(
    out: RunFolder,
    asked: Request,
    *,
    table: list[Row],
    figures: Sequence[str],
    seconds: float,
    state: str = "",
    findings: str = "",
    spent: str = "",
) -> None:
    text = report.compose(
        header.read(asked.config_path),
        state=state,
        described=out.read_json("environment.json"),
        config=(out / "config.json").read_text(),
        table=table,
        figures=figures,
        seconds=seconds,
        findings=findings,
        spent=spent,
    )
    out.write("report.md", text)
