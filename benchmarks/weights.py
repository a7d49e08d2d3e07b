"""Weights in int8 and bfloat16 beside float32: the loss under every policy, and the speed.

    python -m benchmarks.weights nll --out benchmarks/results/weights-nll.jsonl
    python -m benchmarks.weights speed --out benchmarks/results/weights-speed.jsonl

Writes a row for each policy, which a later call with the same --out leaves out, or for each way of
keeping the weights. Speeds are of one process whose models take turns, token by token and chunk by
chunk, so that a busy moment of the machine falls on all alike. 20 and 3 minutes on two CPU cores.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lminf.checkpoints import fetch
from lminf.data import sources
from lminf.experiments._streams import Stream
from lminf.lm.lm import LM
from lminf.models import cost
from lminf.run import devices, environment
from lminf.run.progress import Progress
from lminf.surgery.quantize import quantize

# Each attends to at most 1,034 tokens, where a number is what limits it.
POLICIES = (
    "full", "window:window=1024", "lambda:window=1024,sinks=10",
    "lm_infinite:window=1024,sinks=10", "streaming:window=1024,sinks=10", "rerope:window=1024",
    "leaky_rerope:window=1024,stretch=8", "self_extend:window=1024,group=8",
    "moba:block=128,topk=8", "topk:window=1024,sinks=10,topk=20,at=8",
    "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256", "longheads:attended=1024",
    "hip:topk=512,window=512,sinks=10", "infinite_hip:topk=(2048,1024,512),window=512,sinks=10",
    "h2o:capacity=1024,sinks=10,recent=512,turn=256", "tova:capacity=1024,sinks=10,turn=256",
    "sirllm:capacity=1024,sinks=10,recent=512,turn=256", "snapkv:capacity=1024", "think:ratio=0.5",
)  # fmt: skip
PROMPT = 1536  # tokens, for the policies that act at its end
CHUNK = 512  # tokens read at a time
BLOCK = 64  # tokens: losses of neighbours depend on each other, those of blocks hardly
KEPT = {
    "float32": (jnp.float32, "float"),
    "bfloat16": (jnp.bfloat16, "float"),
    "int8, float32 activations": (jnp.float32, "int8"),
    "int8, bfloat16 activations": (jnp.bfloat16, "int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("nll", "speed"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--length", type=int, default=4096, help="tokens read, of the default text")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096],
                        help="tokens before those that are decoded")  # fmt: skip
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded with each")
    parser.add_argument("--chunks", type=int, default=7, help="of 512 tokens, read with each")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    devices.configure(fetch.compiled_folder())
    processor = environment.cpu_model()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = losses(args) if args.work == "nll" else speeds(args)
    with args.out.open("a" if args.work == "nll" else "w") as out:
        for row in rows:
            line = json.dumps({"model": args.model, "processor": processor, **row})
            print(line, flush=True)
            print(line, file=out, flush=True)


def losses(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Mean nats per token in float32 and in int8, and of their difference a 95% interval."""
    lm = LM.from_pretrained(args.model)
    int8 = dataclasses.replace(lm, params=quantize(lm.params))
    ids, _ = lm.encode(sources.text_of(None), length=args.length)
    done = args.out.read_text().splitlines() if args.out.exists() else []
    for text in POLICIES:
        if any(json.loads(line)["policy"] == text for line in done):
            continue
        prompt = (
            PROMPT if lm.with_policy(text).policy.name.startswith(("snapkv", "think")) else None
        )
        exact, found = (
            model.with_policy(text).token_nll(ids, prompt=prompt) for model in (lm, int8)
        )
        difference = (found - exact).astype(np.float64)
        yield {
            "policy": text,
            "tokens": len(exact),
            "nll_float32": float(exact.mean(dtype=np.float64)),
            "nll_int8": float(found.mean(dtype=np.float64)),
            "difference": float(difference.mean()),
            "half_width": half_width(difference),
        }


def half_width(values: Float[np.ndarray, " T"]) -> float:
    """Of the 95% interval of the mean, from means of blocks."""
    blocks = values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
    return float(1.96 * blocks.std(ddof=1) / len(blocks) ** 0.5)


def speeds(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes of weights, milliseconds a token and tokens a second of each way of keeping them.

    Beside them the median ratio to the float32 of the same turn, of times and of speeds.
    """
    models = {
        name: LM.from_pretrained(args.model, dtype=dtype, weights=weights)
        for name, (dtype, weights) in KEPT.items()
    }
    decoding = {
        context: turns(models, context, args.steps, Stream.step) for context in args.contexts
    }
    reading = turns(models, CHUNK, args.chunks, partial(Stream.read, chunk=CHUNK))
    for column, (name, lm) in enumerate(models.items()):
        row = {
            "weights": name,
            "weights_bytes": cost.weight_bytes(lm.params),
            "steps": args.steps,
            "chunks": args.chunks,
            "read_tokens_per_second": CHUNK / float(np.median(reading[:, column])),
            "read_speed_of_float32": float(np.median(reading[:, 0] / reading[:, column])),
        }
        for context, seconds in decoding.items():
            ratios = seconds[:, column] / seconds[:, 0]
            row[f"ms_per_token_after_{context}"] = 1e3 * float(np.median(seconds[:, column]))
            row[f"time_of_float32_after_{context}"] = float(np.median(ratios))
            row[f"quartiles_after_{context}"] = np.percentile(ratios, [25, 75]).tolist()
        yield row


def turns(
    models: Mapping[str, LM], position: int, rounds: int, measure: Callable[[Stream], float]
) -> Float[np.ndarray, "rounds models"]:
    """Seconds of each model in each round, behind `position` tokens; what compiles is left out."""
    streams = [Stream(lm, position, room=max(rounds + 1, CHUNK)) for lm in models.values()]
    with Progress(rounds + 1, label=f"behind {position} tokens", unit="turns") as progress:
        seconds = []
        for done in range(rounds + 1):
            seconds.append([measure(stream) for stream in streams])
            progress.update(done + 1)
    return np.array(seconds[1:])


if __name__ == "__main__":
    main()
