"""From a command line to a run folder: what every experiment does before and after its question.

def run(config, out): yields rows          values -> measurements; `out` is the run's folder
def plot(rows): returns a figure           or a dictionary of them, by file stem
def table(rows): returns rows              what to print; optional

if __name__ == "__main__":
    main(run, plot, table=table)

An experiment that `resumes` goes on when its command is given again with the same --out. `check`
refuses settings that contradict each other, or are on the command line (their dotted names are its
second argument) and read by nothing. `before` runs once the config is read and before JAX starts,
which is when processes join each other.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lminf.atomic import without_remains
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
    check: Callable[[Any, Collection[str]], None] = lambda config, given: None,
    before: Callable[[Any], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, runs, and leaves rows, figures and a report; exits the process."""
    devices.configure(fetch.compiled_folder())
    arguments = sys.argv[1:] if argv is None else list(argv)
    with exits.orderly(debug="--debug" in arguments):
        parsed = request.parse(Path(inspect.getfile(run)).stem, arguments)
        if parsed is None:  # --help
            return
        check(parsed.config, parsed.overrides)
        if before is not None:
            before(parsed.config)
        if not resumes:
            with without_remains(parsed.out or folder.runs_of(parsed.experiment)):
                measure(parsed, run, plot, table)
        elif leads():
            names = names_in(parsed.out)
            # A new folder of the run's own name nobody else can want.
            with (
                lock.held(parsed.out)
                if parsed.out
                else without_remains(folder.runs_of(parsed.experiment))
            ):
                measure(parsed, run, plot, table, names=names, resumes=True, may_change=may_change)
        else:
            assist(parsed, run)


def leads() -> bool:
    """Whether this is the process that writes the run's files."""
    import jax

    return jax.process_index() == 0


def assist(request: Request, run: Run) -> None:
    """Takes part in a run that another process writes down."""
    if request.out is None:
        raise InputError("several processes share one folder; name it with --out")
    for _ in run(request.config, RunFolder(request.out)):
        pass


def names_in(out: Path | None) -> frozenset[str] | None:
    """What the folder holds before the call; None if there is none."""
    if out is None or not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{out} is not a folder; name another one with --out")
    return frozenset(entry.name for entry in out.iterdir())


def measure(
    request: Request,
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
        names = names_in(request.out)
    out = folder.create(
        request.experiment,
        variant=request.variant,
        config=request.resolved(),
        config_source=request.config_path.read_text(encoding="utf-8"),
        overrides=request.overrides,
        command=environment.command_line(),
        at=request.out,
        resume=resumes,
        may_change=may_change,
    )
    started, earlier = time.monotonic(), out.rows()
    if earlier and table:
        with foreign_rows_refused(out, request.experiment):
            table(earlier)

    def nothing_new() -> bool:
        """The run was finished by an earlier call, whose report stays."""
        return out.rows() == earlier and complete(out)

    try:
        for row in measured(run, request, out, earlier):
            out.append_row(row)
        if not out.rows():
            raise InputError(f"{request.experiment} measured nothing; give it something to measure")
    except BaseException as failure:
        if nothing_new():
            raise
        spent = time.monotonic() - started
        kept = keep_what_there_is(out, request, failure, names, seconds=spent, resumes=resumes)
        if isinstance(failure, InputError):
            raise InputError("; ".join(filter(None, (str(failure), kept)))) from failure
        print(kept, file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    rows = out.rows()
    with foreign_rows_refused(out, request.experiment) if earlier else contextlib.nullcontext():
        shown = table(rows) if table else rows
        drawn = plot(rows)
    figures = plots.write(out, drawn, request.experiment)
    if not nothing_new():
        spent = (
            f" in the last of several calls, which found {len(earlier)} of {len(rows)} rows there"
        )
        write_report(
            out,
            request,
            table=shown,
            figures=figures,
            seconds=seconds,
            spent=spent if earlier else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(tables.rich_table(shown))
    for path in [*figures, "report.md", "rows.jsonl"]:
        print(out / path)
    return out


def measured(
    run: Run, request: Request, out: RunFolder, earlier_rows: Sequence[Row]
) -> Iterator[Row]:
    """What the run yields; refuses rows that lay there before and lack a column that it reads."""
    try:
        yield from run(request.config, out)
    except KeyError as error:
        if all(name in row for row in earlier_rows for name in error.args):
            raise
        with foreign_rows_refused(out, request.experiment):
            raise


@contextlib.contextmanager
def foreign_rows_refused(out: RunFolder, experiment: str) -> Iterator[None]:
    """One sentence where rows that lay there are not such as the experiment writes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the rows of {out.path} are not those of {experiment} "
            f"({folder.row_problem(error)}), so nothing is drawn; name another folder with --out"
        ) from error


INCOMPLETE = "what follows is incomplete."


def complete(out: RunFolder) -> bool:
    """Whether its report is of a run that came to its end."""
    written = out / "report.md"
    return written.exists() and INCOMPLETE not in written.read_text(encoding="utf-8")


def keep_what_there_is(
    out: RunFolder,
    request: Request,
    failure: BaseException,
    names: frozenset[str] | None,
    *,
    seconds: float,
    resumes: bool,
) -> str:
    """Writes a report without figures, for which the rows may not be enough; says what is there.
    Of a refusal before anything ran nothing stays, and there is nothing to say.
    """
    rows = out.rows()
    if isinstance(failure, InputError) and not rows and not out.metrics() and out.undo(names):
        return ""
    how = "Interrupted" if isinstance(failure, KeyboardInterrupt) else f"Failed ({failure})"
    state = f"**{how} after {len(rows)} rows: {INCOMPLETE}**"
    write_report(out, request, table=rows, figures=[], seconds=seconds, state=state)
    if not rows:
        return f"no row was measured, as {out / 'report.md'} says"
    how_to_go_on = (
        f"the same command with --out={out.path} goes on from there"
        if resumes
        else "this experiment cannot go on from there: begin again in another folder"
    )
    return f"{len(rows)} rows are in {out / 'rows.jsonl'}; {how_to_go_on}"


def write_report(
    out: RunFolder,
    request: Request,
    *,
    table: list[Row],
    figures: Sequence[str],
    seconds: float,
    state: str = "",
    findings: str = "",
    spent: str = "",
) -> None:
    text = report.compose(
        header.read(request.config_path),
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
