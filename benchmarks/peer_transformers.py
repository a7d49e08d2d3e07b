"""The same work as benchmarks/ours.py by transformers: one JSON object on stdout.

    .venv-parity/bin/python benchmarks/peer_transformers.py read   --model=FILE.gguf --ids=ids.npy
    .venv-parity/bin/python benchmarks/peer_transformers.py decode --model=FILE.gguf --ids=ids.npy

For a Python with torch and transformers; nothing of lminf is imported. The model is dequantised
from the same file, on two threads.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

CHUNK = 512  # tokens whose logits exist at once, as in lminf
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("read", "decode"))
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file")
    parser.add_argument("--ids", type=Path, required=True, help="token ids of the text, .npy")
    parser.add_argument("--length", type=int, default=16384, help="tokens to read")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(
        args.model.parent, gguf_file=args.model.name, dtype=getattr(torch, args.dtype)
    ).eval()
    ids = torch.from_numpy(np.load(args.ids).astype(np.int64))[None]
    with torch.inference_mode():
        measured = {"read": read, "decode": decode}[args.work](model, ids, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"policy": "full", "peak_memory_bytes": peak, **measured}))


def read(model, ids, args: argparse.Namespace) -> dict:
    """Seconds to score `length` tokens in one forward pass, logits in chunks; their mean NLL."""
    ids = ids[:, : args.length]
    started = time.perf_counter()
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0]
    losses = [
        torch.nn.functional.cross_entropy(
            model.lm_head(hidden[start : start + CHUNK]).float(),
            ids[0, 1 + start : 1 + start + CHUNK],
            reduction="none",
        )
        for start in range(0, len(hidden), CHUNK)
    ]
    nll = torch.cat(losses).double().mean().item()
    return {"tokens": ids.shape[1], "seconds": time.perf_counter() - started, "nll": nll}


def decode(model, ids, args: argparse.Namespace) -> dict:
    """Milliseconds of each greedy step behind `context` tokens.

    A bare loop over the model with its cache, without what `generate` does between steps.
    """
    cache = DynamicCache()
    out = model(ids[:, : args.context], cache=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    times, written = [time.perf_counter()], [int(token)]
    for _ in range(args.new + 1):
        out = model(token, cache=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        written.append(int(token))
        times.append(time.perf_counter())
    return {
        "context": args.context,
        "ms": (1e3 * np.diff(times)[1:]).tolist(),
        "wrote": written,
    }


if __name__ == "__main__":
    main()
