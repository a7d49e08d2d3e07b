"""Seconds of reading and milliseconds of decoding with lminf, as one JSON object on stdout.

    python benchmarks/ours.py read   --policy=lm_infinite:window=4096,sinks=10 --length=16384
    python benchmarks/ours.py decode --policy=full --context=4096

The same work as benchmarks/peer_transformers.py, on the same token ids.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from lminf.attention.policy import POLICIES
from lminf.checkpoints import fetch
from lminf.config import parse_choice
from lminf.data import sources
from lminf.lm.generate import GREEDY, generate_tokens
from lminf.lm.lm import LM, WEIGHTS
from lminf.run import devices, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("read", "decode"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--policy", default="full")
    parser.add_argument("--length", type=int, default=16384, help="tokens to read")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", choices=WEIGHTS, default="float")
    args = parser.parse_args()
    devices.configure(fetch.compiled_folder())
    policy = parse_choice(args.policy, POLICIES, what="policy")
    lm = LM.from_pretrained(
        args.model, policy=policy, dtype=jnp.dtype(args.dtype), weights=args.weights
    )
    lm = lm.with_devices(jax.local_devices())
    measured = {"read": read, "decode": decode}[args.work](lm, args)
    print(json.dumps({"policy": policy.name, "peak_memory_bytes": memory.peak_bytes(), **measured}))


def read(lm: LM, args: argparse.Namespace) -> dict:
    """Seconds to score `length` tokens, once everything is compiled, and their mean NLL."""
    tokens, _ = lm.encode(sources.text_of(None), length=args.length)
    ends = [time.perf_counter()]
    nll = lm.token_nll(tokens, progress=lambda done, total: ends.append(time.perf_counter()))
    chunks = np.diff(ends)
    # Compiling is paid in the first chunk; what it takes besides is at most what the second takes.
    compiling = max(chunks[0] - chunks[1], 0.0) if len(chunks) > 1 else 0.0
    return {
        "tokens": len(tokens),
        "seconds": float(chunks.sum() - compiling),
        "compile_seconds": float(compiling),
        "nll": float(nll.mean(dtype=np.float64)),
    }


def decode(lm: LM, args: argparse.Namespace) -> dict:
    """Milliseconds between tokens of greedy generation behind `context` tokens: each of `new`."""
    tokens, _ = lm.encode(sources.text_of(None), length=args.context)
    times, written = [], []
    for token in generate_tokens(
        lm, [tokens], sampling=GREEDY, max_new_tokens=args.new + 2, key=jax.random.key(0)
    ):
        times.append(time.perf_counter())
        written.append(int(token[0]))
    # The first token ends the reading of the prompt, the second waits for the step's compilation.
    return {"context": len(tokens), "ms": (1e3 * np.diff(times)[1:]).tolist(), "wrote": written}


if __name__ == "__main__":
    main()
