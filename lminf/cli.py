"""The `lminf` command: a table of names, each a small module in lminf/commands.

A module defines `add_arguments(parser)` and `run(args)`, prints its result and raises InputError.
Only the module that was asked for is imported, so that `lminf --help` starts no JAX.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lminf import __version__
from lminf.config import closest
from lminf.errors import InputError
from lminf.run import exits

COMMANDS = {  # the module is lminf.commands.<name>
    "list": "the experiments by topic; with a name, all about one",
    "run": "one experiment; in a checkout also python -m experiments.NAME",
    "sweep": "every cell of a sweep that is not finished yet",
    "show": "tables and figures of finished runs",
    "fetch": "a named model into the user's cache folder",
    "nll": "how well a model predicts a text, by position",
    "generate": "what a model says next",
    "eval": "how well a model answers, by task, prompt length and policy",
    "rerank": "whether a model's ranking of documents obeys an instruction (FollowIR)",
    "harness": "tasks of lm-evaluation-harness, by model and policy",
    "plan": "parameters, FLOPs and cache sizes of a model; runs nothing",
    "tokenize": "texts into a token store, for training",
    "data": "what token stores hold, and what data plans make of them",
    "ngram": "how often any sequence of tokens occurs in a corpus, and what follows it",
    "world": "texts whose truth is known, with questions about them, as token stores",
    "convert": "a checkpoint into another format",
    "expand-vocab": "a model with more tokens for a text",
    "scaling": "scaling laws: fits and predictions",
}


class _Once(argparse.Action):
    """Stores a value. A second one is an error, because one of them would be lost, and so is an
    empty one, which a script gives whose variable is not set.
    """

    _stored_in: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings and self._stored_in is namespace:
            first = getattr(namespace, self.dest)
            parser.error(
                f"{option_string} is given twice, as {first!r} and as {values!r}; give it once"
            )
        if values == "" or (isinstance(values, list) and "" in values):
            name = option_string or self.metavar or self.dest
            parser.error(f"{name} is empty; give a value, or leave it out")
        self._stored_in = namespace
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the words in one sentence, without the usage."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` lists what there is")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 2 and one line on bad input, with a traceback on --debug."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with exits.orderly(debug="--debug" in arguments):
        args = parse(arguments)
        args.command(args)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `command` is the function to call with them."""
    command_index = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    if command_index is None:
        return overview().parse_args(arguments)
    name = arguments[command_index]
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}; {closest(name, COMMANDS)}")
    module = importlib.import_module(f"lminf.commands.{name.replace('-', '_')}")
    # The help of `scaling` depends on the verb: it prints it itself.
    prints_own_help = name == "scaling"
    parser = Parser(prog=f"lminf {name}", description=COMMANDS[name], add_help=not prints_own_help)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    module.add_arguments(parser)
    parser.set_defaults(command=module.run)
    words = [*arguments[:command_index], *arguments[command_index + 1 :]]
    if name in ("run", "sweep", "harness"):  # passes on what it does not know, so the order matters
        return parser.parse_args(words)
    # In any order: plain parsing gives up on an optional word that stands behind an option.
    return parser.parse_intermixed_args(words)


def overview() -> argparse.ArgumentParser:
    """The parser of the bare command: help, and the list of commands."""
    parser = Parser(
        prog="lminf",
        description="Length, vocabulary and hyper-parameters of language models.",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument("--version", action="version", version=f"lminf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    main()
