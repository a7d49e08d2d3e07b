"""lminf nll MODEL: how well a model predicts a text, by position."""

import argparse
import json
import time

from rich.console import Console

from lminf.attention.policies import POLICIES
from lminf.config import parse_choice
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import perplexity
from lminf.lm import LM
from lminf.run import memory, tables
from lminf.run.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a table name, a folder, a .gguf file, owner/name"
    )
    parser.add_argument("--policy", default="full", help="as in lm_infinite:window=4096,sinks=10")
    parser.add_argument("--text", metavar="FILE", help="default: the interpreter's documentation")
    parser.add_argument("--length", type=int, help="tokens to read; default: the whole text")
    parser.add_argument("--block", type=int, default=2048, help="tokens averaged into one number")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    policy = parse_choice(args.policy, POLICIES)
    for name in ("length", "block"):
        value, least = getattr(args, name), {"length": 2, "block": 1}[name]
        if value is not None and value < least:
            raise InputError(f"--{name}={value}: give at least {least} tokens")
    text = sources.text_of(args.text)
    lm = LM.from_pretrained(args.model, policy=policy)
    tokens = args.length or len(lm.encode(text)[0])
    started = time.perf_counter()
    with Progress(tokens, label=policy.name, unit="tokens") as progress:
        result = lm.nll(text, length=args.length, progress=lambda done, _: progress.update(done))
    seconds = time.perf_counter() - started
    blocks = perplexity.by_position([result.token_nll], block=args.block)
    found = {
        "blocks": [block.nll for block in blocks],
        "bits_per_byte": result.bits_per_byte,
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_bytes": memory.peak_bytes(),
        "mean": result.mean,
        "block": args.block,
        "policy": policy.name,
        "model": args.model,
        "text_digest": sources.digest(text),
    }
    if args.json:
        print(json.dumps(found))
        return
    rows = [{"tokens": f"{b.start}–{b.stop}", "nats/token": b.nll} for b in blocks]
    Console(highlight=False).print(tables.rich_table(rows, title=policy.name))
    print(
        f"{result.mean:.4f} nats/token  {result.bits_per_byte:.4f} bits/byte  {tokens} tokens  "
        f"{seconds:.1f} s  {found['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
