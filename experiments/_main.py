"""From a command line to a run folder: what every experiment does before and after its question.

def run(config, out): yields rows          values -> measurements; `out` is the run's folder
def plot(rows): returns a figure           or a dictionary of them, by file stem
def table(rows): returns rows              what to print; optional

if __name__ == "__main__":
    main(run, plot, table=table)
"""

import ast
import importlib.util
import inspect
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_flags
from rich.console import Console

from lminf.config import closest
from lminf.errors import InputError
from lminf.run import environment, exits, folder, header, plots, report, tables
from lminf.run.folder import Row, RunFolder

Run = Callable[[Any, RunFolder], Iterator[Row]]
Plot = Callable[[list[Row]], Figure | Mapping[str, Figure]]
TableOf = Callable[[list[Row]], list[Row]]


def main(
    run: Run, plot: Plot, *, table: TableOf | None = None, argv: Sequence[str] | None = None
) -> None:
    """Parses the command line, runs, and leaves rows, figures and a report; exits the process."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with exits.orderly(debug="--debug" in arguments):
        request = parse(Path(inspect.getfile(run)).stem, arguments)
        if request is not None:  # None: --help
            measure(request, run, plot, table)


# --- From values to a finished folder -------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one command line asks for."""

    experiment: str
    config: ConfigDict
    config_path: Path
    overrides: Mapping[str, Any]
    out: Path | None  # the run's folder; None: a new one below runs/


def measure(request: Request, run: Run, plot: Plot, table: TableOf | None) -> RunFolder:
    """Runs to the end, or leaves what was measured until then; returns the folder."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    out = folder.create(
        request.experiment,
        config=to_dict(request.config),
        config_source=request.config_path.read_text(encoding="utf-8"),
        overrides=request.overrides,
        command=environment.command_line(),
        at=request.out,
    )
    started = time.monotonic()
    state = "Failed after {rows} rows."
    try:
        for row in run(request.config, out):
            out.append_row(row)
        state = ""
    except KeyboardInterrupt:
        state = "Interrupted after {rows} rows; what follows is incomplete."
        raise
    except InputError:
        if not out.rows():
            out.remove()  # nothing was measured, so there is nothing to report
        raise
    finally:
        if out.path.exists():
            finish(out, request, plot, table, state, time.monotonic() - started, console)
    return out


def finish(
    out: RunFolder,
    request: Request,
    plot: Plot,
    table: TableOf | None,
    state: str,
    seconds: float,
    console: Console,
) -> None:
    """Prints the table, draws the figures from the rows and writes the report.

    Of a run that did not end (`state` says how), only the report is written: its rows may not
    be enough for a figure.
    """
    rows = out.rows()
    shown = rows
    names: list[str] = []
    if not state:
        shown = table(rows) if table else rows
        names = plots.write(out, plot(rows), request.experiment)
    text = report.compose(
        header.read(request.config_path),
        state=state.format(rows=len(rows)),
        described=out.read_json("environment.json"),
        config=(out / "config.json").read_text(),
        table=shown,
        figures=names,
        seconds=seconds,
    )
    out.write("report.md", text)
    if not state:
        console.print(tables.rich_table(shown))
        for name in names:
            print(f"figure  {out / name}")
    print(f"report  {out / 'report.md'}")
    print(f"rows    {out / 'rows.jsonl'}")


# --- From a command line to values ----------------------------------------------------------------


def parse(experiment: str, arguments: Sequence[str]) -> Request | None:
    """What the arguments ask for; None when they ask for help, which is then printed."""
    arguments = list(arguments)
    path, variant = find_config(experiment, take(arguments, "config"))
    config = load_config(path, variant)
    if {"--help", "-h", "-help"} & set(arguments):
        show_help(experiment, path, config)
        return None
    check_overrides(arguments, config)
    arguments = [quote_words(argument, config) for argument in arguments]
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the run's folder", flag_values=values)
    flags.DEFINE_boolean("debug", False, "show a traceback with an error", flag_values=values)
    overridden = config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=[experiment, *arguments]
    )
    try:
        rest = values([experiment, *arguments])[1:]
    except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(" ".join(str(error).split()) + "; --help lists what there is") from error
    if rest:
        raise InputError(
            f"{rest[0]!r} is not a flag; an override is written --config.FIELD=VALUE, a variant "
            f"--config={experiment}:VARIANT"
        )
    return Request(
        experiment=experiment,
        config=overridden.value,
        config_path=path,
        overrides=dict(values["config"].override_values),
        out=Path(values.out) if values.out else None,
    )


def take(arguments: list[str], name: str) -> str | None:
    """Removes `--name=value` or `--name value` from the arguments; the value of the last one."""
    value = None
    position = 0
    while position < len(arguments):
        flag, equals, text = arguments[position].partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            position += 1
            continue
        if not equals and position + 1 == len(arguments):
            raise InputError(f"--{name} needs a value, as in --{name}=FILE.py:variant")
        value = text if equals else arguments[position + 1]
        del arguments[position : position + (1 if equals else 2)]
    return value


def find_config(experiment: str, given: str | None) -> tuple[Path, str]:
    """The config file and its variant: `FILE.py:variant`, `NAME:variant`, `:variant`, or nothing.

    A relative FILE is looked for from here, then from the repository, so that the commands of the
    documentation work in any directory.
    """
    file, _, variant = (given or "").partition(":")
    if not file:
        file = experiment
    if file.endswith(".py"):
        places = [Path(file), header.ROOT / file]
    else:
        places = [header.CONFIGS / f"{file}.py"]
    for path in places:
        if path.is_file():
            return path, variant
    stems = [path.stem for path in sorted(header.CONFIGS.glob("[!_]*.py"))]
    raise InputError(f"there is no config file {file!r}; {closest(Path(file).stem, stems)}")


def load_config(path: Path, variant: str) -> ConfigDict:
    """What the file's get_config returns for the variant."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; a config file ends in .py")
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the config file {path}: {error}") from error
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config(arg); every config file defines one")
    config = module.get_config(variant)
    accept_values_for_none(config)
    return config


def accept_values_for_none(config: ConfigDict) -> None:
    """Lets a field that is None in the file be given any value; it would refuse all others."""
    for key in config:
        if isinstance(config[key], ConfigDict):
            accept_values_for_none(config[key])
        elif config[key] is None and config.get_type(key) is types.NoneType:
            with config.ignore_type():
                config[key] = placeholder(object)


def check_overrides(arguments: Sequence[str], config: ConfigDict) -> None:
    """Refuses `--config.path` that names no field, with the closest field that exists."""
    fields = dict(leaves(config))
    sections = {name.rpartition(".")[0] for name in fields}
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-")
        for prefix in ("config.", "noconfig."):
            name = flag.removeprefix(prefix)
            if name == flag or name in fields:
                continue
            if name in sections:
                inner = [field for field in fields if field.startswith(f"{name}.")]
                raise InputError(f"config.{name} is a section; override {', '.join(inner)}")
            raise InputError(f"the config has no field {name!r}; {closest(name, fields)}")


def quote_words(argument: str, config: ConfigDict) -> str:
    """`--config.policies=full` with the quotes that a tuple of words needs to be read as one."""
    flag, equals, text = argument.partition("=")
    value = dict(leaves(config)).get(flag.lstrip("-").removeprefix("config."))
    if not equals or not isinstance(value, tuple) or not all(isinstance(x, str) for x in value):
        return argument
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return f"{flag}={text!r}"
    return argument


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field, in the order of the config file."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_dict(value: Any) -> Any:
    """A ConfigDict as plain dictionaries, lists and scalars, ready for JSON."""
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):
        return {key: to_dict(value[key]) for key in value}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def show_help(experiment: str, path: Path, config: ConfigDict) -> None:
    found = header.read(path)
    print(f"{found.title}\n")
    for key, text in found.entries.items():
        print(f"{key:10} {text}")
    print(f"\nusage: python -m experiments.{experiment} [--config=FILE.py[:variant]]", end=" ")
    print("[--config.FIELD=VALUE ...] [--out=DIR] [--debug]\n")
    for name, value in leaves(config):
        print(f"  --config.{name}={value}")
