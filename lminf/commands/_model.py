"""The words by which commands choose a model and how it attends."""

import argparse
import sys
import typing

import jax
import jax.numpy as jnp

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL
from lminf.attention.rope import SCALINGS
from lminf.checkpoints import fetch
from lminf.config import parse_choice
from lminf.data.tokenizers import Special
from lminf.lm.lm import DTYPES, LM
from lminf.run import devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a table name, a folder, a .gguf file, owner/name")
    parser.add_argument("--policy", help="as in lm_infinite:window=4096,sinks=10; the one that the "
                        "model was trained with, if its lminf.json says, or else full")  # fmt: skip
    parser.add_argument("--scaling", help="rotary schedule in place of the model's own, as in "
                        "yarn:factor=4,trained_length=8192")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of weights and activations (float32)")  # fmt: skip
    parser.add_argument("--weights", default="float", help="int8: matrices in a quarter of the "
                        "memory of float32; float: in --dtype (float)")  # fmt: skip


def add_special(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--special", choices=typing.get_args(Special), default="plain",
                        help="special tokens written out in texts: plain characters, or parsed as "
                        "tokens (plain)")  # fmt: skip


def seed(text: str) -> int:
    """A seed of a random key: 32 bits."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text} is no seed; give a whole number below 2^32")
    return int(text)


def load(args: argparse.Namespace) -> LM:
    """The model under the policy asked for; nothing is loaded before both words are understood."""
    policy = parse_policy(args.policy) if args.policy else None
    scaling = parse_choice(args.scaling, SCALINGS, what="scaling") if args.scaling else None
    devices.configure(fetch.compiled_folder())
    lm = LM.from_pretrained(
        args.model, policy=policy, dtype=jnp.dtype(args.dtype), weights=args.weights
    )
    if policy is None and lm.policy != FULL:
        print(f"attending as trained, by {lm.policy.name} (lminf.json)", file=sys.stderr)
    if scaling is not None:
        lm = lm.with_scaling(scaling)
    return lm.with_devices(jax.local_devices())
