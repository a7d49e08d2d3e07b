"""lminf harness run …: tasks of lm-evaluation-harness, with all of its own options.

`--model lminf` is understood; `--model hf` asks transformers.
"""

import argparse
import importlib.util
import sys

from lminf.checkpoints import fetch
from lminf.errors import InputError
from lminf.run import devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verb", choices=("run", "ls", "validate"), help="as of lm_eval")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…",
        help="passed on: --tasks NAME --model_args pretrained=MODEL,policy=POLICY; --help lists "
        "them",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed; run pip install 'lminf[harness]'")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from lminf.evals import harness  # registers the model

    words = [word for word in args.arguments if word != "--debug"]
    named = ("--model=", "-M", "--config", "-C")  # a configuration names its model
    if args.verb == "run" and not any(w == "--model" or w.startswith(named) for w in words):
        words += ["--model", harness.MODEL]
    devices.configure(fetch.compiled_folder())
    sys.argv = ["lminf harness", args.verb, *words]
    cli_evaluate()
