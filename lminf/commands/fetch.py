"""lminf fetch NAME: a named model into the user's cache folder; prints where it lies."""

import argparse

from lminf.checkpoints import fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a model of the table, or owner/name")


def run(args: argparse.Namespace) -> None:
    print(fetch.fetch(args.name))
