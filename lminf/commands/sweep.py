"""lminf sweep NAME …: every cell of a sweep that is not finished yet; then its tables and figures.

lminf sweep NAME --config=NAME:variant --config.FIELD=VALUE --out=DIR
  --shard=0/4                one worker of four on a shared folder: begins at its own cells
  --submit=slurm --jobs=4    the same four as SLURM jobs through submitit (local: as processes)
  --minutes=60               time limit of a submitted job
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from lminf.checkpoints import fetch
from lminf.config import closest
from lminf.errors import InputError
from lminf.run import devices, environment, header, plots, request, sweep, tables
from lminf.run.folder import RunFolder
from lminf.run.request import Request

CLUSTERS = ("slurm", "local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("name", metavar="NAME", help="an experiment; vocab stands for vocab_sweep")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…")


def run(args: argparse.Namespace) -> None:
    devices.configure(fetch.compiled_folder())
    arguments = [a for a in args.arguments if a != "--debug"]
    shard = request.take(arguments, "shard")
    cluster, jobs = request.take(arguments, "submit"), request.take(arguments, "jobs")
    minutes = request.take(arguments, "minutes")
    if (jobs or minutes) and not cluster:
        raise InputError("--jobs and --minutes belong to --submit=slurm or --submit=local")
    name = experiment_of(args.name)
    run_request = request.parse(name, arguments)
    if run_request is None:  # --help
        return
    cells = cells_of(name, run_request)
    out = sweep.create(run_request, cells, environment.command_line())
    if cluster:
        if shard:
            raise InputError("--submit makes the shards itself; leave --shard out")
        submit(name, arguments, out, cluster=cluster, jobs=_count("jobs", jobs or "1"),
               minutes=_count("minutes", minutes or "60"))  # fmt: skip
    else:
        work(name, run_request, cells, out, sweep.Shard.parse(shard or "0/1"))
    conclude(name, run_request, cells, out)


def experiment_of(name: str) -> str:
    """The experiment's module name: `vocab` is experiments/vocab_sweep.py."""
    known = [entry.name for entry in header.experiments()]
    if name in known:
        return name
    sweeps = {one.removesuffix("_sweep"): one for one in known if one.endswith("_sweep")}
    if name not in sweeps:
        raise InputError(
            f"there is no sweep {name!r}; {closest(name, sweeps)}, or an experiment and a --config "
            f"file with get_sweep"
        )
    return sweeps[name]


def cells_of(name: str, run_request: Request) -> tuple[sweep.Cell, ...]:
    """The cells, of which at least one has settings that do not contradict each other.

    Not all of them: a published grid has cells whose warm-up never ends.
    """
    cells = sweep.cells_of(run_request)
    check = getattr(experiment(name), "check", lambda config, given: None)
    refused = None
    for cell in cells:
        try:
            check(cell.config, run_request.overrides)
        except InputError as error:
            refused = refused or InputError(f"every cell is refused, the first ({cell}): {error}")
        else:
            return cells
    assert refused is not None
    raise refused


def work(
    name: str, run_request: Request, cells: Sequence[sweep.Cell], out: RunFolder, shard: sweep.Shard
) -> None:
    module = experiment(name)
    began = time.monotonic()
    total, count = len(cells), 0

    def say(text: str) -> None:
        nonlocal count
        count += not text.startswith(" ")
        done = len(sweep.finished(out, cells))
        print(f"[{time.monotonic() - began:6.0f} s, {done}/{total} finished] {text}", flush=True)

    try:
        tally = sweep.work(out, run_request, cells, module.run, shard=shard, say=say)
    except KeyboardInterrupt:
        done = len(sweep.finished(out, cells))
        print(f"{done} of {total} cells are kept in {out.path}; the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise
    print(f"{tally.ran} cells run, {tally.found_done} finished before", flush=True)
    for reason in tally.elsewhere:
        print(f"left alone: {reason}")
    if tally.failed:
        raise InputError(
            f"{len(tally.failed)} of {total} cells failed, the first {tally.failed[0]}; "
            f"the same command runs them again"
        )


def submit(
    name: str, arguments: Sequence[str], out: RunFolder, *, cluster: str, jobs: int, minutes: int
) -> None:
    """Starts the workers as jobs of a cluster; `local` jobs are waited for."""
    if cluster not in CLUSTERS:
        raise InputError(f"--submit={cluster}: use {' or '.join(CLUSTERS)}")
    try:
        submitit = importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise InputError("--submit needs submitit: pip install 'lminf[sweep]'") from error
    executor = submitit.AutoExecutor(folder=out / "jobs", cluster=cluster)
    executor.update_parameters(timeout_min=minutes, name=f"sweep-{name}")
    kept = list(arguments)
    request.take(kept, "out")
    started = []
    with executor.batch():
        for index in range(jobs):
            command = [sys.executable, "-m", "lminf.cli", "sweep", name, *kept]
            command += [f"--out={Path(out.path).resolve()}", f"--shard={index}/{jobs}"]
            started.append(executor.submit(submitit.helpers.CommandFunction(command)))
    print(f"jobs {', '.join(job.job_id for job in started)}; their logs are in {out / 'jobs'}")
    if cluster == "local":
        for job in started:
            job.result()


def conclude(name: str, run_request: Request, cells: Sequence[sweep.Cell], out: RunFolder) -> None:
    """The rows so far; once all cells are finished, the figures and the report too."""
    rows = sweep.collect(out, cells)
    done = sweep.finished(out, cells)
    if len(done) < len(cells):
        print(f"{len(done)} of {len(cells)} cells are finished: {out / 'rows.jsonl'}")
        return
    main = importlib.import_module("lminf.experiments._main")
    module = experiment(name)
    table = getattr(module, "table", None)
    lines = table(rows) if table else rows
    figures = plots.write(out, module.plot(rows), name)
    beside = module.files(rows) if hasattr(module, "files") else {}
    for file, text in beside.items():
        out.write(file, text)
    ended = [sweep.cell_folder(out, cell).read_json(sweep.DONE) for cell in cells]
    seconds, processor = (sum(cell[key] for cell in ended) for key in ("seconds", "cpu_seconds"))
    main.write_report(
        out, run_request, table=lines, figures=figures, seconds=seconds,
        findings=module.findings(rows) if hasattr(module, "findings") else "",
        spent=f" in the cells, beside what else the machine did; {processor:.1f} s of processor "
        f"time, so at least {processor / (os.cpu_count() or 1):.0f} s on this machine when quiet",
    )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(
        tables.rich_table(lines)
    )
    for path in [*figures, *beside, "report.md", "rows.jsonl"]:
        print(out / path)


def experiment(name: str) -> ModuleType:
    return importlib.import_module(f"lminf.experiments.{name}")


def _count(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--{name}={text}: give a whole number of at least 1")
    return int(text)
