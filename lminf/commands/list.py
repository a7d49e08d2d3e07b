"""lminf list: the experiments by topic; with a topic, their titles; with a name, all about one."""

import argparse
import itertools
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from lminf.config import closest
from lminf.errors import InputError
from lminf.run import header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="TOPIC|NAME",
        help="the titles of a topic's experiments, or all about an experiment",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False)
    topics: dict[str, list[header.Header]] = {}
    for experiment in header.experiments():
        topics.setdefault(experiment.entries.get("Topic", "other"), []).append(experiment)
    if not args.names:
        console.print(overview(topics))
        # Beside the list, which fits a screen and may be read by another program.
        hint = "lminf list TOPIC: titles; lminf list NAME: question, command, time, what to expect"
        print(hint, file=sys.stderr)
        return
    named = {each.name: each for each in itertools.chain.from_iterable(topics.values())}
    for name in args.names:
        if name in topics:
            console.print(titles(topics[name]))
        elif name in named:
            show(named[name], console)
        else:
            known = closest(name, [*topics, *named])
            raise InputError(f"there is no experiment or topic {name!r}; {known}")


def show(experiment: header.Header, console: Console) -> None:
    console.print(f"{experiment.name}: {experiment.title}", style="bold")
    for key, text in experiment.entries.items():
        console.print(Padding(f"{key:10} {text}", (0, 0, 0, 2)))
    console.print()


def overview(topics: dict[str, list[header.Header]]) -> Table:
    """A row for each topic with the names of its experiments: 60 of them fit a screen."""
    table = Table.grid(padding=(0, 2))
    for topic, experiments in sorted(topics.items()):
        table.add_row(topic, "  ".join(experiment.name for experiment in experiments))
    return table


def titles(experiments: Sequence[header.Header]) -> Table:
    """A row for each experiment, cut at the width of the terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=max(len(each.name) for each in experiments))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for experiment in experiments:
        table.add_row(experiment.name, experiment.title)
    return table
