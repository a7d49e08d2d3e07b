"""lminf scaling collect: finished sweeps as a table that `lminf scaling fit` takes."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from lminf.atomic import atomic_write
from lminf.commands.scaling._arguments import Result
from lminf.errors import InputError
from lminf.experiments import _collect as tables
from lminf.run import folder

KINDS = {"vocab": tables.vocab, "step": tables.step}


def collect(args: argparse.Namespace) -> Result:
    """The table of finished sweeps, written to --out, and of a vocabulary study its fertility."""
    names = [name for name in args.runs.split(",") if name]
    rows = [row for name in names for row in rows_of(Path(name))]
    for condition in (args.where or "").split(","):
        field, equals, value = condition.partition("=")
        if equals:
            rows = [row for row in rows if isinstance(row, dict) and str(row.get(field)) == value]
        elif condition:
            raise InputError(f"--where={condition}: write field=value")
    text = KINDS[args.subject](rows)
    target = Path(args.out)
    files = {target: text}
    if args.subject == "vocab":  # `fit vocab` needs it to tell tokens from characters
        measured = json.dumps(tables.fertility(rows).to_json(), indent=2) + "\n"
        files[target.with_suffix(".fertility.json")] = measured
    for path, content in files.items():
        with atomic_write(path) as temporary:
            temporary.write_text(content)
    result = {"rows": text.count("\n") - 1, "written": [str(path) for path in files]}

    def say(console: Console) -> None:
        console.print(f"{result['rows']} rows: {', '.join(result['written'])}")

    return result, say


def rows_of(path: Path) -> list[folder.Row]:
    """The rows of a folder of a sweep or a run."""
    if not (path / "rows.jsonl").is_file():
        raise InputError(f"{path} has no rows.jsonl; give the folder of a sweep or a run")
    try:
        return folder.read_lines(path / "rows.jsonl")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / 'rows.jsonl'} cannot be read ({error})") from error
