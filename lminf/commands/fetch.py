"""lminf fetch NAME: a named model into the user's cache folder; prints where it lies."""

import argparse

from lminf.checkpoints import fetch
from lminf.run.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"owner/name, or {', '.join(fetch.MODELS)}")


def run(args: argparse.Namespace) -> None:
    with Progress(0, label=args.name, unit="bytes") as progress:
        path = fetch.fetch(args.name, progress=progress.show)
    print(path)
