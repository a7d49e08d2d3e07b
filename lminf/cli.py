"""The `lminf` command: a table of names, each a small module in lminf/commands.

A module defines `add_arguments(parser)` and `run(args)`, prints its result and raises InputError.
Only the module that was asked for is imported, so that `lminf --help` starts no JAX.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from lminf.config import closest
from lminf.errors import InputError
from lminf.run import exits

COMMANDS = {  # the module is lminf.commands.<name>
    "list": "the experiments: question, time, what to expect",
    "run": "one experiment, the same as python -m experiments.NAME",
    "show": "tables and figures of finished runs",
    "fetch": "a named model into the user's cache folder",
    "nll": "how well a model predicts a text, by position",
    "generate": "what a model says next",
    "plan": "parameters, FLOPs and cache sizes of a model; runs nothing",
    "convert": "a checkpoint into another format",
    "scaling": "scaling laws: fits and predictions",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 2 and one line on bad input, with a traceback on --debug."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with exits.orderly(debug="--debug" in arguments):
        args = parse(arguments)
        args.command(args)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `command` is the function to call with them."""
    parser = argparse.ArgumentParser(prog="lminf", description="Length generalisation in JAX.")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        raise InputError(f"there is no command {asked!r}; {closest(asked, COMMANDS)}")
    for name, text in COMMANDS.items():
        own = commands.add_parser(name, help=text, description=text)
        # Accepted after the command too; SUPPRESS keeps it from undoing the one before.
        own.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                         help="show a traceback with an error")  # fmt: skip
        if name == asked:
            module = importlib.import_module(f"lminf.commands.{name}")
            module.add_arguments(own)
            own.set_defaults(command=module.run)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
