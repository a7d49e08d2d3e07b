"""The same work as benchmarks/ours.py by llama.cpp: one JSON object on stdout.

    PYTHON benchmarks/peer_llama_cpp.py read   --model=FILE.gguf --ids=ids.npy
    PYTHON benchmarks/peer_llama_cpp.py decode --model=FILE.gguf --ids=ids.npy

For a Python with xllamacpp; nothing of lminf is imported. The file's own 4-bit weights are
multiplied as they are, on two threads. Reading is its prompt phase, which computes the logits of
the last token alone, so it has no NLL, and it reads no more than the trained length.
"""

import argparse
import json
import resource
from pathlib import Path

import numpy as np
import xllamacpp

THREADS = 2
LIMIT = 8190  # tokens: its server takes no longer text than the model was trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("read", "decode"))
    parser.add_argument("--model", type=Path, required=True, help="the .gguf file")
    parser.add_argument("--ids", type=Path, required=True, help="token ids of the text, .npy")
    parser.add_argument("--length", type=int, default=16384, help="tokens to read")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    args = parser.parse_args()
    tokens, new = (
        (min(args.length, LIMIT), 1) if args.work == "read" else (args.context, args.new + 1)
    )
    params = xllamacpp.CommonParams()
    params.model.path = str(args.model)
    params.n_ctx, params.n_parallel, params.verbosity = tokens + new + 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {
            "prompt": np.load(args.ids)[:tokens].tolist(),
            "n_predict": new,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
    )
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp answered {answer}")
    timings = answer["timings"]
    if timings["prompt_n"] != tokens or timings["predicted_n"] != new:
        raise SystemExit(f"asked for {tokens} tokens and {new} new ones, but it ran {timings}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {"policy": "full", "peak_memory_bytes": peak}
    if args.work == "read":
        measured |= {"tokens": tokens, "seconds": timings["prompt_ms"] / 1e3}
    else:
        # It reports the sum of its steps: their mean, where the other sides have a median.
        measured |= {"context": tokens, "ms": [timings["predicted_ms"] / new]}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
