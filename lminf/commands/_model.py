"""The words by which commands choose a model and how it attends."""

import argparse
import typing

import jax
import jax.numpy as jnp

from lminf.attention.parsing import parse_policy
from lminf.attention.rope import SCALINGS
from lminf.config import parse_choice
from lminf.data.tokenizers import Special
from lminf.lm import LM
from lminf.run import devices

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a table name, a folder, a .gguf file, owner/name")
    parser.add_argument("--policy", default="full", help="as in lm_infinite:window=4096,sinks=10")
    parser.add_argument("--scaling", help="rotary schedule in place of the model's own, as in "
                        "yarn:factor=4,trained_length=8192")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of weights and activations (float32)")  # fmt: skip
    parser.add_argument("--special", choices=typing.get_args(Special), default="plain",
                        help="special tokens written out in texts: plain characters, or parsed as "
                        "tokens (plain)")  # fmt: skip


def load(args: argparse.Namespace) -> LM:
    """The model under the policy asked for; nothing is loaded before both words are understood."""
    policy = parse_policy(args.policy)
    scaling = parse_choice(args.scaling, SCALINGS, what="scaling") if args.scaling else None
    devices.share_cores()
    lm = LM.from_pretrained(args.model, dtype=jnp.dtype(args.dtype))
    if scaling is not None:
        lm = lm.with_scaling(scaling)
    return lm.with_policy(policy).with_devices(jax.local_devices())
