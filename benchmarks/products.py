"""What the products alone cost of a token that is decoded or read: the least that a step can take.

    python -m benchmarks.products --out benchmarks/results/products.jsonl

The products are those of SmolLM2-135M's layers and head with their own weights, by XLA: with q, k
and v, and gate and up, as separate products, and merged into one each. Beside them stands the whole
step under full attention. Processor time, so that other work on the machine counts little; all take
turns. 2 minutes on two CPU cores.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lminf.checkpoints import fetch
from lminf.experiments._streams import Stream
from lminf.lm import layerwise
from lminf.lm.lm import LM
from lminf.models import heads
from lminf.models.layers import matmul
from lminf.run import devices, environment
from lminf.types import Params

MODEL = "smollm2-135m-instruct"
CHUNK = 512  # tokens read at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096, help="tokens before those measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    devices.configure(fetch.compiled_folder())
    lm = LM.from_pretrained(MODEL).with_policy("full")
    layers = layerwise.layer_params(lm.spec, lm.params)
    with args.out.open("w") as out:
        for work, tokens, repeats in (("decode", 1, 8), ("read", CHUNK, 1)):
            x, stream = jnp.ones((1, tokens, lm.spec.width)), Stream(lm, args.context, room=CHUNK)
            runs = {
                "whole": stream.step if work == "decode" else partial(stream.read, CHUNK),
                "products": products(lm, separate, [separated(p) for p in layers], x),
                "merged products": products(lm, merged, [joined(p) for p in layers], x),
            }
            times = processor_times(runs, args.rounds, repeats)
            row = {
                "work": work,
                "model": MODEL,
                "processor": environment.cpu_model(),
                "context": args.context,
                "rounds": args.rounds,
                "processor_ms_per_token": {
                    name: 1e3 * statistics.median(each) / tokens for name, each in times.items()
                },
                "share_of_whole": {n: ratios(each, times["whole"]) for n, each in times.items()},
            }
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=out, flush=True)


def processor_times(
    runs: dict[str, Callable[[], Any]], rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Processor seconds of each in every round. They take turns, and the first turn compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            for _ in range(repeats):
                run()
            if turn:
                times[name].append((time.process_time() - started) / repeats)
    return times


def ratios(each: list[float], whole: list[float]) -> list[float]:
    """Least, median and greatest of the ratios of one turn."""
    found = sorted(a / b for a, b in zip(each, whole, strict=True))
    return [found[0], statistics.median(found), found[-1]]


def products(
    lm: LM, layer: Callable[..., Array], weights: list[Any], x: Array
) -> Callable[[], None]:
    """Runs the products of all layers and of the head of the last token, layer by layer."""
    run = jax.jit(layer)
    head = jax.jit(lambda params, x: heads.lm(lm.spec, params, x[:, -1]))

    def all_layers() -> None:
        y = x
        for of_layer in weights:
            y = run(of_layer, y)
        head(lm.params, y).block_until_ready()

    return all_layers


def separated(params: Params) -> list[Array]:
    attention, mlp = params["attention"], params["mlp"]
    names = ("wq", "wk", "wv", "wo"), ("w_gate", "w_up", "w_down")
    return [part[n] for part, of in zip((attention, mlp), names, strict=True) for n in of]


def joined(params: Params) -> list[Array]:
    """The weights of the products of one input side by side."""
    wq, wk, wv, wo, gate, up, down = map(np.asarray, separated(params))
    flat = [w.reshape(len(w), -1) for w in (wq, wk, wv)]
    parts = np.concatenate(flat, 1), wo, np.concatenate([gate, up], 1), down
    return [jnp.asarray(part) for part in parts]


def separate(weights: list[Array], x: Array) -> Array:
    wq, wk, wv, wo, gate, up, down = weights
    q, k, v = (matmul(x, w) for w in (wq, wk, wv))
    y = x + matmul(q + (k + v).sum(), wo, contract=2)
    return y + matmul(matmul(y, gate) * matmul(y, up), down)


def merged(weights: list[Array], x: Array) -> Array:
    qkv, wo, gate_up, down = weights
    heads_, width, _ = wo.shape
    q, kv = jnp.split(matmul(x, qkv), [heads_ * width], -1)
    y = x + matmul(q.reshape(*x.shape[:2], heads_, width) + kv.sum(), wo, contract=2)
    gate, up = jnp.split(matmul(y, gate_up), 2, -1)
    return y + matmul(gate * up, down)


if __name__ == "__main__":
    main()
