"""lminf list: every experiment with what its config file says about it."""

import argparse

from rich.console import Console
from rich.padding import Padding

from lminf.run import header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these experiments")


def run(args: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False)
    for found in header.experiments(args.names):
        console.print(f"{found.name}: {found.title}", style="bold")
        for key, text in found.entries.items():
            console.print(Padding(f"{key:10} {text}", (0, 0, 0, 2)))
        console.print()
