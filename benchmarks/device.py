"""Checks and times everything on the accelerator at hand, the most valuable first.

    python -m benchmarks.device --minutes 8 --out FILE.json [--peers-python PYTHON]
    python -m benchmarks.device --tiny --out FILE.json       every part, in toy sizes, anywhere

The file is written anew after each part, so that what was measured is kept when the time ends; no
part begins after that, and one that fails says so in its place. Weights are random: speed does not
depend on them. Times of kernels are those of `lminf.kernels.suite`, beside its peers of torch where
a Python with torch is named. The last part searches block sizes and writes them to a file beside
the results, in the form of `kernels/tuned`.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lminf import kernels
from lminf.atomic import atomic_write
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import LMInfinite
from lminf.data.tokenizers import ByteTokenizer
from lminf.kernels import suite
from lminf.kernels.common import tuning
from lminf.kernels.peers import Peers
from lminf.kernels.programs import Work
from lminf.lm.generate import GREEDY, generate_tokens
from lminf.lm.lm import LM
from lminf.models import cost, decoder
from lminf.models.spec import ModelSpec, llama
from lminf.parallel import hardware, mesh, partition
from lminf.run import memory
from lminf.train import planning
from lminf.train.optim import AdamW
from lminf.train.step import TrainStep

POLICIES = (
    "full",
    "lm_infinite:window=4096,sinks=10",
    "infllm:window=4096,sinks=128,topk=16,block=128",
)
TINY_POLICIES = ("full", "lm_infinite:window=16,sinks=4", "infllm:window=16,sinks=4,topk=2,block=8")


@dataclass(frozen=True)
class Sizes:
    """Of all parts, in tokens unless said otherwise."""

    attention: dict[str, int]
    decode: dict[str, int]
    infllm: dict[str, int]  # block-sparse attention over its blocks of 128
    hip: dict[str, int]  # and over HiP's, gathered to 64
    loss: dict[str, int]
    read: int
    new: int
    reader: ModelSpec
    train: tuple[tuple[int, int], ...]  # (length, rows)
    trained: ModelSpec


def sizes(*, tiny: bool) -> Sizes:
    """Those of the published numbers, or toys of the same form."""
    heads = {"N": 4, "K": 2, "H": 16} if tiny else {"N": 32, "K": 8, "H": 128}
    length, window = (256, 32) if tiny else (131_072, 4096)
    attention = {"B": 1, "T": length, "w": window, "g": 16 if tiny else 128} | heads
    blocks = {key: attention[key] for key in ("B", "T", "N", "K", "H", "w", "g")}
    context = 64 if tiny else 131_072
    return Sizes(
        attention=attention,
        decode=attention | {"B": 2 if tiny else 16},
        infllm=blocks | {"block": 16 if tiny else 128, "listed": 4 if tiny else 16},
        hip=blocks | {"block": 16 if tiny else 64, "listed": 2 if tiny else 8},
        loss={"N": 64, "D": 32, "V": 512} if tiny else {"N": 8192, "D": 2304, "V": 256_000},
        read=context,
        new=4 if tiny else 64,
        reader=llama(
            vocab_size=49_152 if not tiny else 257, width=576 if not tiny else 32,
            num_layers=30 if not tiny else 2, num_heads=9 if not tiny else 4,
            num_kv_heads=3 if not tiny else 2, hidden_dim=1536 if not tiny else 64,
            trained_length=8192,
        ),
        train=((32, 2), (64, 1)) if tiny else ((4096, 8), (32_768, 1)),
        trained=llama(
            vocab_size=257 if tiny else 50_304, width=32 if tiny else 2048,
            num_layers=2 if tiny else 16, num_heads=4 if tiny else 16,
            num_kv_heads=2 if tiny else 8, hidden_dim=64 if tiny else 8192,
            trained_length=8192,
        ),
    )  # fmt: skip


# --- Parts ----------------------------------------------------------------------------------------


def parts(
    size: Sizes, policies: tuple[str, ...], peers: Peers | None, tuned: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what measures it), the most valuable first."""
    planned = suite.plan(jax.default_backend(), quick=True)
    ours = (*suite.NATIVE.get(jax.default_backend(), ()), "xla_chunked")

    def of_suite(*work: Work, check: bool = False) -> Callable[[], Any]:
        kinds = ("bfloat16",) if check else ()
        one = dataclasses.replace(planned, work=work, check_dtypes=kinds)
        return lambda: suite.run(one, peers)

    def attention(*, grad: bool = False) -> Work:
        return Work("lambda_attention", size.attention, grad, ours, suite.ATTENTION)

    yield "kernels against float64", of_suite(check=True)
    yield "attention, forward", of_suite(attention())
    decode = (*suite.NATIVE.get(jax.default_backend(), ()), "xla")
    yield "decode", of_suite(Work("lambda_decode", size.decode, False, decode))
    yield "loss", of_suite(Work("linear_cross_entropy", size.loss, True, ours, suite.LOSS))
    for text in policies:
        yield f"model under {text}", lambda text=text: model(size, text)
    for length, rows in size.train:
        yield f"training at {length}", lambda at=(length, rows): training(size, *at)
    yield "attention, backward", of_suite(attention(grad=True))
    for name, case in (("InfLLM", size.infllm), ("HiP", size.hip)):
        yield f"blocks of {name}", of_suite(Work("block_sparse_attention", case, False, ours))
    yield "block sizes", lambda: search(size, tuned)


def model(size: Sizes, policy: str) -> dict[str, Any]:
    """Tokens per second of reading a text, and milliseconds a token after it."""
    weights = decoder.init(size.reader, key=jax.random.key(0))
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    lm = LM(size.reader, weights, ByteTokenizer(), parse_policy(policy), jnp.bfloat16)
    ids = np.random.default_rng(0).integers(0, 256, size.read).astype(np.int32)
    lm.token_nll(ids)  # compiles
    started = time.perf_counter()
    lm.token_nll(ids)
    seconds, ends = time.perf_counter() - started, []
    for token in generate_tokens(
        lm, [ids[: size.read - size.new]], sampling=GREEDY, max_new_tokens=size.new,
        key=jax.random.key(0),
    ):  # fmt: skip
        np.asarray(token)
        ends.append(time.perf_counter())
    steps = 1e3 * np.diff(ends)[1:]  # the first compiles
    return {
        "tokens": size.read,
        "tokens_per_second": size.read / seconds,
        "ms_per_token": np.percentile(steps, [25, 50, 75]).tolist(),
        "peak_bytes": memory.peak_bytes(),
    }


def training(size: Sizes, length: int, rows: int) -> dict[str, Any]:
    """Seconds a step of a windowed model, and the share of the peak that its FLOPs are."""
    spec = dataclasses.replace(size.trained, trained_length=length)
    program = TrainStep(
        spec, (LMInfinite(min(4096, length), 16),) * spec.num_layers, mesh.single(),
        partition.STRATEGIES["data"], AdamW().build(), lambda step: jnp.float32(1e-4),
        dtype=jnp.bfloat16, remat="full",
    )  # fmt: skip
    state = program.init(key=jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (rows, length + 1))
    batch = {"tokens": jnp.asarray(ids[:, :-1], jnp.int32),
             "targets": jnp.asarray(ids[:, 1:], jnp.int32)}  # fmt: skip
    seconds, loss = [], math.nan
    for _ in range(6):
        started = time.perf_counter()
        state, metrics = program.step(state, batch)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - started)
    step = float(np.median(seconds[1:]))
    flops = planning.flops_per_token(program, length) * rows * length
    return {
        "parameters": cost.parameters(spec),
        "tokens": rows * length,
        "seconds": step,
        "mfu": flops / step / hardware.peak_flops(jax.devices()[0]),
        "loss": loss,
        "peak_bytes": memory.peak_bytes(),
    }


def search(size: Sizes, path: Path) -> dict[str, Any]:
    """The block sizes that beat the heuristic's by 3 %, written as a table."""
    case, key = size.attention, jax.random.key(0)
    q, k, v = (
        jax.random.normal(
            jax.random.fold_in(key, n), (1, case["T"], count, case["H"]), jnp.bfloat16
        )
        for n, count in enumerate((case["N"], case["K"], case["K"]))
    )

    def attend(q, k, v):
        return kernels.lambda_attention(q, k, v, num_global=0, window_size=case["w"])

    table = tuning.autotune(attend, q, k, v)
    table.dump(path)
    return {"table": path.name, "entries": len(table.entries)}


# --- One run --------------------------------------------------------------------------------------


def measure(
    measured: Iterator[tuple[str, Callable[[], Any]]], *, seconds: float, out: Path
) -> dict[str, Any]:
    """What each part measured, or how it failed; what is left when the time ends is named."""
    started, skipped = time.monotonic(), []
    results: dict[str, Any] = suite.environment(None) | {"parts": {}, "not_reached": skipped}
    for name, part in measured:
        spent = time.monotonic() - started
        if spent > seconds:
            skipped.append(name)
            continue
        print(f"\n=== {name} ({spent:.0f} s so far)", flush=True)
        # Whatever a compiler or a driver raises is this part's result, and not the others'.
        try:
            result = part()
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            print(result["failed"])
        took = time.monotonic() - started - spent
        results["parts"][name] = {"took_s": took, "result": result}
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
    return results


def failures(results: dict[str, Any]) -> list[str]:
    """Names of the parts that raised, or whose kernels were wrong."""
    return [
        name
        for name, part in results["parts"].items()
        if "failed" in part["result"]
        or not all(check["ok"] for check in part["result"].get("checks", []))
    ]


def main(arguments: list[str] | None = None) -> int:
    """0 if every part that was reached passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, type=Path, help="where the results go, JSON")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no part begins later")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument("--peers-python", help="a Python that has torch")
    given = parser.parse_args(arguments)
    # The peers' process needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peers = Peers(given.peers_python) if given.peers_python else None
    if peers is not None and "absent" in peers.versions:
        peers = None
    tuned = given.out.with_name(f"{given.out.stem}-tuned.json")
    policies = TINY_POLICIES if given.tiny else POLICIES
    try:
        measured = parts(sizes(tiny=given.tiny), policies, peers, tuned)
        results = measure(measured, seconds=60 * given.minutes, out=given.out)
    finally:
        if peers is not None:
            peers.close()
    for name in (failed := failures(results)):
        print(f"failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
