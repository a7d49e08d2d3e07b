"""lminf plan MODEL: parameters, FLOPs and cache bytes; nothing is trained or run."""

import argparse
import json

import jax.numpy as jnp
from rich.console import Console

from lminf import checkpoints
from lminf.attention import policies
from lminf.attention.policies import POLICIES
from lminf.config import parse_choice
from lminf.errors import InputError
from lminf.models import cost
from lminf.run import tables

DEFAULT = ("full", "window:window={w}", "lm_infinite:window={w},sinks=10")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a table name, a folder, a .gguf file, owner/name"
    )
    parser.add_argument("--policy", action="append", help="may repeat; default: full and windowed")
    parser.add_argument(
        "--length", type=int, help="tokens of the text; default: 4 x trained length"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    spec = checkpoints.read_spec(args.model)
    length = 4 * spec.trained_length if args.length is None else args.length
    if length < 1:
        raise InputError(f"--length={length}: give at least 1 token")
    half = spec.trained_length // 2
    chosen = args.policy or [text.format(w=half) for text in DEFAULT]
    products = cost.matmul_flops_per_token(spec)
    rows = []
    for text in chosen:
        policy = parse_choice(text, POLICIES, what="policy")
        by_layer = policies.by_layer(policy, windows=spec.windows, num_kv_heads=spec.num_kv_heads)
        attention = cost.attention_flops(spec, by_layer, length)
        rows.append(
            {
                "policy": policy.name,
                "flops_per_token": products + attention / length,
                "attention_share": attention / (attention + products * length),
                "cache_bytes": cost.cache_bytes(
                    spec, by_layer, tokens=length, dtype=jnp.dtype(args.dtype)
                ),
            }
        )
    facts = {
        "model": args.model,
        "family": spec.family,
        "parameters": cost.parameters(spec),
        "matmul_flops_per_token": products,
        "trained_length": spec.trained_length,
        "length": length,
        "dtype": args.dtype,
    }
    if args.json:
        print(json.dumps({**facts, "policies": rows}))
        return
    print("\n".join(f"{key:24} {value:,}" if isinstance(value, int) else f"{key:24} {value}"
                    for key, value in facts.items()))  # fmt: skip
    Console(highlight=False).print(tables.rich_table(rows))
