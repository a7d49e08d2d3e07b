"""lminf list: every experiment in a line; lminf list NAME: all that its config file says."""

import argparse
import sys

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from lminf.run import header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="all about these experiments")


def run(args: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False)
    headers = header.experiments(args.names)
    if not args.names:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=max(len(each.name) for each in headers))
        table.add_column(no_wrap=True, overflow="ellipsis")
        for experiment in headers:
            table.add_row(experiment.name, experiment.title)
        console.print(table)
        # Beside the list, which fits a screen and may be read by another program.
        print("lminf list NAME: question, command, time, what to expect", file=sys.stderr)
        return
    for experiment in headers:
        console.print(f"{experiment.name}: {experiment.title}", style="bold")
        for key, text in experiment.entries.items():
            console.print(Padding(f"{key:10} {text}", (0, 0, 0, 2)))
        console.print()
