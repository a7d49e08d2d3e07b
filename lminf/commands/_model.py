"""The words by which commands choose a model and how it attends."""

import argparse

import jax

from lminf.attention.parsing import parse_policy
from lminf.attention.rope import SCALINGS
from lminf.config import parse_choice
from lminf.lm import LM
from lminf.run import devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a table name, a folder, a .gguf file, owner/name")
    parser.add_argument("--policy", default="full", help="as in lm_infinite:window=4096,sinks=10")
    parser.add_argument("--scaling", help="rotary schedule in place of the model's own, as in "
                        "yarn:factor=4,trained_length=8192")  # fmt: skip


def load(args: argparse.Namespace) -> LM:
    """The model under the policy asked for; nothing is loaded before both words are understood."""
    policy = parse_policy(args.policy)
    scaling = parse_choice(args.scaling, SCALINGS, what="scaling") if args.scaling else None
    devices.share_cores()
    lm = LM.from_pretrained(args.model)
    if scaling is not None:
        lm = lm.with_scaling(scaling)
    return lm.with_policy(policy).with_devices(jax.local_devices())
