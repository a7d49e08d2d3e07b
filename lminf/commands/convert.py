"""lminf convert SRC DST: any checkpoint that can be read, as safetensors and config.json."""

import argparse
from pathlib import Path

from lminf import checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a model's name, a folder or a .gguf file")
    parser.add_argument("target", metavar="DST", type=Path, help="a new or empty folder")


def run(args: argparse.Namespace) -> None:
    checkpoints.save(args.target, checkpoints.load(args.source))
    print(args.target)
