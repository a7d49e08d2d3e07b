"""lminf convert SRC DST: any checkpoint that can be read, as safetensors and config.json."""

import argparse

from lminf import checkpoints
from lminf.run.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a table name, a folder, a .gguf file, owner/name"
    )
    parser.add_argument("target", metavar="DST", help="a new or empty folder")


def run(args: argparse.Namespace) -> None:
    checkpoints.check_save(args.target)
    with Progress(0, label="reading", unit="tensors") as progress:
        checkpoint = checkpoints.load(args.source, progress=progress.show)
    checkpoints.save(args.target, checkpoint)
    print(args.target)
