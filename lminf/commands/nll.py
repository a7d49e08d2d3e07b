"""lminf nll MODEL: how well a model predicts texts, by position."""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int
from rich.console import Console

from lminf.commands import _model
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import perplexity, stream
from lminf.lm.lm import LM
from lminf.lm.nll import bits_per_byte
from lminf.ranges import Range
from lminf.run import memory, tables
from lminf.run.progress import Progress

STREAM_CHUNK = 128_000  # tokens; that of the 200-million-token run
# Of each text the tokens, and the byte where each of them ends.
Encoded: TypeAlias = Sequence[tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    _model.add_special(parser)
    parser.add_argument("--text", action="append", metavar="FILE",
                        help="may repeat; default: the interpreter's documentation")  # fmt: skip
    parser.add_argument("--field", default="text", help="of the documents in JSON and parquet; "
                        "those of a file are read as one text")  # fmt: skip
    parser.add_argument("--length", type=int, help="tokens to read of each text; default: all")
    parser.add_argument("--prompt", type=int, metavar="TOKENS",
                        help="how many tokens of each text are the prompt, for the policies that "
                        "act at its end")  # fmt: skip
    parser.add_argument("--block", type=int, default=2048, help="tokens averaged into one number")
    parser.add_argument("--protocol", choices=("document", "stream"), default="document",
                        help="each text by itself, or all as one shuffled stream")  # fmt: skip
    parser.add_argument("--seed", type=_model.seed, help="of the stream's order (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    for name, least in {"length": 2, "block": 1, "prompt": 1}.items():
        value = getattr(args, name)
        stated = Range(min=least, max=2**31 - 1)
        if value is not None and (problem := stated.problem(value, whole=True)):
            raise InputError(f"--{name}={value}: give {problem}")
    unread = "prompt" if args.protocol == "stream" else "seed"
    if getattr(args, unread) is not None:
        raise InputError(
            f"--{unread} means nothing to --protocol={args.protocol}; leave it out, or give the "
            f"other protocol"
        )
    if "" in (args.text or ()):
        raise InputError("--text is empty; name a file, or leave --text out")
    texts = [sources.text_of(path, field=args.field) for path in args.text or [None]]
    lm = _model.load(args)
    encoded = [lm.encode(text, length=args.length, special=args.special) for text in texts]
    started = time.perf_counter()
    blocks, bits, tokens = (along_stream if args.protocol == "stream" else by_document)(
        lm, encoded, args
    )
    if not math.isfinite(bits):
        raise InputError(
            f"the loss is {bits}, so the weights of {args.model} hold NaN or infinite numbers; get "
            f"them again"
        )
    result = {
        "blocks": [block.nll for block in blocks],
        "bits_per_byte": bits,
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": memory.peak_bytes(),
        "block": args.block,
        "policy": lm.policy.name,
        "scaling": args.scaling,
        "dtype": args.dtype,
        "weights": args.weights,
        "protocol": args.protocol,
        "model": args.model,
        "text_digests": [sources.digest(text) for text in texts],
    }
    if args.json:
        print(json.dumps(result))
        return
    rows = [{"tokens": f"{b.start}–{b.stop}", "nats/token": b.nll} for b in blocks]
    Console(highlight=False).print(tables.rich_table(rows, title=lm.policy.name))
    print(
        f"{bits:.4f} bits/byte  {tokens} tokens  {result['seconds']:.1f} s  "
        f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"
    )


def by_document(
    lm: LM, encoded: Encoded, args: argparse.Namespace
) -> tuple[list[perplexity.Block], float, int]:
    """Blocks of positions averaged over the texts, bits per byte, tokens read."""
    losses, token_bytes, total = [], [], sum(len(ids) for ids, _ in encoded)
    with Progress(total, label=lm.policy.name, unit="tokens") as progress:
        tokens_done = 0
        for ids, ends in encoded:
            losses.append(
                lm.token_nll(
                    ids,
                    prompt=args.prompt,
                    progress=lambda done, _, b=tokens_done: progress.update(b + done),
                )
            )
            token_bytes.append(np.diff(ends))
            tokens_done += len(ids)
    bits = bits_per_byte(np.concatenate(losses), int(np.concatenate(token_bytes).sum()))
    return perplexity.by_position(losses, block=args.block), bits, total


def along_stream(
    lm: LM, encoded: Encoded, args: argparse.Namespace
) -> tuple[list[perplexity.Block], float, int]:
    """Blocks along one stream of all texts, bits per byte of the whole, tokens read."""
    skip = int(lm.tokenizer.add_bos)  # the stream has one BOS, at its start
    documents = [ids[skip:] for ids, _ in encoded]
    places, nll = stream.token_nll(lm, documents, chunk=STREAM_CHUNK, seed=args.seed or 0)
    total = sum(len(ids) for ids in documents)
    # One token in a chunk is not scored: its bytes are its share of the whole.
    text_bytes = sum(int(ends[-1]) for _, ends in encoded) * len(nll) / total
    bits = bits_per_byte(nll, text_bytes)
    edges = np.arange(0, places[-1] + args.block + 1, args.block)
    blocks = [
        perplexity.Block(int(low), int(min(high, places[-1] + 1)), int(inside.sum()),
                         float(nll[inside].mean(dtype=np.float64)))
        for low, high in itertools.pairwise(edges)
        if (inside := (places >= low) & (places < high)).any()
    ]  # fmt: skip
    return blocks, bits, total
