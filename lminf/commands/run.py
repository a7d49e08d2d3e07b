"""lminf run NAME …: one experiment; in a checkout the same as python -m experiments.NAME …"""

import argparse
import runpy
import sys

from lminf.run import header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an experiment; `lminf list` prints them")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="…",
        help="passed on: --config=NAME:variant --config.FIELD=VALUE --out=DIR; --help lists them",
    )


def run(args: argparse.Namespace) -> None:
    (experiment,) = header.experiments([args.name])
    debug = ["--debug"] if getattr(args, "debug", False) and "--debug" not in args.arguments else []
    sys.argv = [sys.argv[0], *args.arguments, *debug]
    runpy.run_module(f"lminf.experiments.{experiment.name}", run_name="__main__", alter_sys=True)
