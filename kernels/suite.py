"""One command on any machine: what it can do at best, whether our kernels are right, how fast they
and their peers are, in one run.

    python -m kernels.suite --out results.json [--quick] [--peers all] [--peers-python PYTHON]

Ends with status 1 if a check fails. Peers of torch run in a process of their own (kernels/peers.py
says why), in the Python named, which need not have jax.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kernels
from kernels import checks
from kernels.block_sparse.operands import Lists
from kernels.common import bench
from kernels.decode import cache as caches
from kernels.peers import PEERS, Peers


@dataclass(frozen=True)
class Work:
    """One thing to time: sizes by their letters, and who is asked to do it."""

    op: str
    case: dict[str, int]
    grad: bool
    implementations: tuple[str, ...]
    peers: tuple[str, ...] = ()

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.grad else "fwd"


@dataclass(frozen=True)
class Plan:
    """What a run consists of."""

    dtype: str
    work: tuple[Work, ...]
    check_dtypes: tuple[str, ...]
    seeds: tuple[int, ...]
    repeats: int
    budget_s: float  # for one program; then it stops after three repeats
    gemm_size: int
    copy_megabytes: int


ATTENTION = tuple(name for name, (op, *_) in PEERS.items() if op == "lambda_attention")
LOSS = tuple(name for name, (op, *_) in PEERS.items() if op == "linear_cross_entropy")
JAX_PEERS = ("jax.nn xla (dense causal)", "jax.nn cudnn (window)", "tokamax (dense causal)")
# XLA spreads single operations of one CPU device over cores, and small ones gain nothing by it.
# With a device for each core, whole heads lie apart: the same kernel under shard_map.
BY_HEADS = "xla_chunked, heads over CPU devices"
NATIVE = {"cpu": (), "gpu": ("triton",), "tpu": ("mosaic_tpu",)}


def plan(platform: str, *, quick: bool) -> Plan:
    """The sizes of the specification: small ones on a CPU, a model's on an accelerator."""
    cpu = platform == "cpu"
    ours = (*NATIVE.get(platform, ()), "xla_chunked")
    if cpu:
        shape = {"B": 1, "N": 8, "K": 8, "H": 64, "w": 1024, "g": 64}
        lengths = (8192,) if quick else (8192, 16384)
        loss = {"N": 1024, "D": 512, "V": 49152}
    else:
        shape = {"B": 1, "N": 32, "K": 8, "H": 128, "w": 4096, "g": 100}
        lengths = (32768,) if quick else (131072,)
        loss = {"N": 8192, "D": 2304, "V": 256000}
    work: list[Work] = []
    for length in lengths:
        for grad in (False, True):
            # Dense attention in XLA takes many seconds on a CPU.
            attention = (*ATTENTION, *(() if grad or (cpu and quick) else JAX_PEERS))
            apart = (BY_HEADS,) if cpu and shape["K"] % jax.device_count() == 0 else ()
            case = {"T": length} | shape
            work.append(Work("lambda_attention", case, grad, (*ours, *apart), attention))
    work.append(Work("linear_cross_entropy", loss, True, ours, LOSS))
    decode_ours = (*NATIVE.get(platform, ()), "xla")
    slots = shape | ({"w": 4096, "g": 100} if cpu else {})
    for batch in (1,) if quick else (1, 16):
        for length in (8192, 131072):
            case = slots | {"B": batch, "T": length}
            work.append(Work("lambda_decode", case, False, decode_ours))
    if not quick:
        blocks = shape | {"T": lengths[0], "block": 128, "listed": 8}
        work.append(Work("block_sparse_attention", blocks, True, ours))
    return Plan(
        dtype="float32" if cpu else "bfloat16",
        work=tuple(work),
        check_dtypes=("float32", "bfloat16") if quick else ("float32", "bfloat16", "float16"),
        seeds=(0,) if quick else (0, 1),
        repeats=3 if quick and cpu else 20,
        budget_s=2.0 if quick else 10.0,
        gemm_size=2048 if cpu else 8192,
        copy_megabytes=256 if cpu else 2048,
    )


# --- What is run ----------------------------------------------------------------------------------


class Program(NamedTuple):
    """A compiled call with its inputs. `calls` of them make one timing."""

    run: Callable[[int], Any]
    calls: int
    temporary_bytes: int


def build(work: Work, implementation: str, dtype: str, *, copies: int = 2) -> Program:
    """Our call, compiled. Two sets of random inputs, in turns."""
    maker = {
        "lambda_attention": _attention, "linear_cross_entropy": _loss,
        "lambda_decode": _decode, "block_sparse_attention": _blocks,
    }[work.op]  # fmt: skip
    if work.op == "lambda_decode":
        # Microseconds on an accelerator: eight caches one after the other in one program.
        fn, inputs = maker(work.case, implementation, dtype, 8)
        one = jax.jit(fn).lower(*inputs[0]).compile()
        return Program(bench.chained(fn, inputs), len(inputs), _temporary_bytes(one))
    fn, inputs = maker(work.case, implementation, dtype, copies)
    if work.grad:
        fn = _differentiated(fn, inputs[0])
    compiled = jax.jit(fn).lower(*inputs[0]).compile()
    return Program(bench.blocking(compiled, inputs), 1, _temporary_bytes(compiled))


def _temporary_bytes(compiled) -> int:
    """Of the program; -1 where the backend does not say."""
    found = compiled.memory_analysis()
    return -1 if found is None else found.temp_size_in_bytes


def _differentiated(fn: Callable, inputs: tuple) -> Callable:
    """Value and gradients of every floating-point input, for a random cotangent."""
    floating = tuple(i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating))
    out = jax.eval_shape(fn, *inputs)
    cotangent = _normal(np.random.default_rng(9), out.dtype, *out.shape) if out.ndim else None

    def total(*args):
        out = fn(*args)
        return out if cotangent is None else (out * cotangent).astype(jnp.float32).sum()

    return jax.value_and_grad(total, floating)


def _normal(rng, dtype, *shape, scale: float = 1.0):
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


def _attention(case, implementation: str, dtype: str, copies: int):
    b, t, n, k, h, g = (case[x] for x in "BTNKHg")
    rng = np.random.default_rng(0)
    by_heads = implementation == BY_HEADS

    def attend(query, key, value, query_global, key_global):
        return kernels.lambda_attention(
            query, key, value, query_global=query_global, key_global=key_global,
            num_global=g, window_size=case["w"],
            implementation="xla_chunked" if by_heads else implementation,
        )  # fmt: skip

    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h), (b, g, k, h)]
    inputs = [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(copies)]
    if not by_heads:
        return attend, inputs
    mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, None, "heads")
    spread = jax.shard_map(
        attend, mesh=mesh, in_specs=(split,) * len(shapes), out_specs=split, check_vma=False
    )
    return spread, jax.device_put(inputs, NamedSharding(mesh, split))


def _loss(case, implementation: str, dtype: str, copies: int):
    rows, width, vocab = (case[x] for x in "NDV")
    rng = np.random.default_rng(0)

    def loss(embeddings, classifier, labels):
        return kernels.linear_cross_entropy(
            embeddings, classifier, labels, implementation=implementation
        )

    classifier = _normal(rng, dtype, vocab, width, scale=0.05)  # too large for any cache
    return loss, [
        (_normal(rng, dtype, rows, width), classifier, jnp.asarray(rng.integers(0, vocab, rows)))
        for _ in range(copies)
    ]


def _decode(case, implementation: str, dtype: str, copies: int):
    b, n, k, h, w, g = (case[x] for x in "BNKHwg")
    rng = np.random.default_rng(0)

    def decode(query, cache):
        return kernels.lambda_decode(query, cache, implementation=implementation)

    def cache():
        length = jnp.full(b, case["T"], jnp.int32)
        far, near = ([_normal(rng, dtype, b, k, slots, h) for _ in range(2)] for slots in (g, w))
        return caches.RollingCache(far[0], far[1], near[0], near[1], length)

    return decode, [(_normal(rng, dtype, b, n, h), cache()) for _ in range(copies)]


def _blocks(case, implementation: str, dtype: str, copies: int):
    b, t, n, k, h = (case[x] for x in "BTNKH")
    rng, block = np.random.default_rng(0), case["block"]
    lists = _random_lists(rng, -(-t // block), case["listed"])

    def attend(query, key, value):
        return kernels.block_sparse_attention(
            query, key, value, block_q=block, block_kv=block, implementation=implementation,
            block_indices=lists.indices, block_counts=lists.counts,
        )  # fmt: skip

    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h)]
    return attend, [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(copies)]


def _random_lists(rng, blocks: int, listed: int) -> Lists:
    """Causal lists of up to `listed` blocks, one's own among them."""
    indices = np.full((1, 1, blocks, listed), -1, np.int32)
    for q in range(blocks):
        drawn = np.sort(rng.permutation(q)[: listed - 1])
        indices[0, 0, q, : len(drawn) + 1] = [*drawn, q]
    return Lists(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1, dtype=np.int32)))


def jax_peer(name: str, work: Work, dtype: str) -> Program:
    """An attention of somebody else's in JAX, compiled; raises what it raises."""
    case = work.case
    b, t, n, k, h = (case[x] for x in "BTNKH")
    if "xla" in name and 4 * b * n * t * t > 3e9:
        raise NotImplementedError(f"its logits would take {4 * b * n * t * t / 1e9:.0f} GB")
    if "cudnn" in name and jax.default_backend() != "gpu":
        raise NotImplementedError("needs a gpu")
    rng = np.random.default_rng(0)
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h)]
    inputs = [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(2)]

    def attend(query, key, value):
        if "tokamax" in name:
            import tokamax  # type: ignore[import-not-found]  # a peer, where it is installed

            return tokamax.dot_product_attention(query, key, value, is_causal=True)
        window = (case["w"] - 1, 0) if "window" in name else None
        implementation = "cudnn" if "cudnn" in name else "xla"
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=window,
            implementation=implementation,
        )  # fmt: skip

    compiled = jax.jit(attend).lower(*inputs[0]).compile()
    return Program(bench.blocking(compiled, inputs), 1, _temporary_bytes(compiled))


# --- Floors ---------------------------------------------------------------------------------------


def pairs(length: int, *, window: int, num_global: int) -> int:
    """Visible pairs of one head."""
    window = min(window, length)
    near = window * (window + 1) // 2 + (length - window) * window
    beyond = np.arange(length) - window + 1
    return near + int(np.clip(beyond, 0, num_global).sum())


def costs(work: Work, itemsize: int) -> tuple[float, float]:
    """FLOPs and bytes that the work cannot do without."""
    case = work.case
    if work.op == "linear_cross_entropy":
        rows, width, vocab = (case[x] for x in "NDV")
        gemm = 2.0 * rows * width * vocab
        arrays = (rows + vocab) * width * itemsize
        return (4 * gemm, 3 * arrays) if work.grad else (gemm, arrays)
    b, t, n, k, h = (case[x] for x in "BTNKH")
    if work.op == "lambda_decode":
        slots = case["w"] + case["g"]
        return 4.0 * b * n * slots * h, 2.0 * b * k * slots * h * itemsize
    if work.op == "block_sparse_attention":
        block, blocks = case["block"], -(-t // case["block"])
        listed = sum(min(q + 1, case["listed"]) for q in range(blocks))
        seen = listed * block * block - blocks * block * (block - 1) // 2
    else:
        seen = pairs(t, window=case["w"], num_global=case["g"])
    forward = 4.0 * b * n * h * seen
    arrays = 2.0 * b * t * (n + k) * h * itemsize
    return (3.5 * forward, 3 * arrays) if work.grad else (forward, arrays)


# --- One run --------------------------------------------------------------------------------------


def environment(peers: Peers | None) -> dict[str, Any]:
    """Commit, date, device and versions."""
    device = jax.devices()[0]
    versions = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "triton", "jax-triton", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if peers is not None:
        versions |= {f"{k} (peers)": v for k, v in peers.versions.items() if k not in versions}
    return {
        "schema": 1,
        "commit": _output("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "kind": _cpu_name() if device.platform == "cpu" else device.device_kind,
            "count": len(os.sched_getaffinity(0)) if device.platform == "cpu"
            else jax.device_count(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "versions": versions,
    }  # fmt: skip


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    here = pathlib.Path(__file__).parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_name() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "cpu")


def run(planned: Plan, peers: Peers | None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The results, in the schema of the specification; printed as they come."""
    results = environment(peers)
    absent: list[str] = [] if peers is not None else ["torch"]
    absent += [] if importlib.util.find_spec("tokamax") else ["tokamax"]

    gemm = bench.gemm_tflops(planned.dtype, planned.gemm_size)
    copy = bench.copy_tbps(planned.copy_megabytes)
    results["ceilings"] = {"gemm_tflops": gemm, "copy_tbps": copy}
    say(f"{results['device']}\nceilings: {gemm:.3f} TFLOP/s, {copy:.4f} TB/s ({planned.dtype})")
    peer_gemm = math.nan
    if peers is not None:
        peer_gemm = peers.ask(gemm=planned.gemm_size, dtype=planned.dtype)["tflops"]
        say(f"torch's own product: {peer_gemm:.3f} TFLOP/s")

    refused: dict[str, str] = {}
    found = [
        row
        for seed in planned.seeds
        for row in checks.check(checks.cases(seed), planned.check_dtypes, refused)
    ]
    failed = [row for row in found if not row["ok"]]
    say(f"{len(found)} checks, {len(failed)} failed")
    for row in failed:
        say(f"  FAILED {row}")
    for name, reason in refused.items():
        say(f"  not here: {name}: {reason}")
    results["checks"] = found

    timings: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for work in planned.work:
        programs = _programs(work, planned, peers, absent, found, say)
        seconds = bench.interleaved(
            {name: program.run for name, program in programs.items()},
            repeats=planned.repeats, budget_s=planned.budget_s, warmup=0,
        )  # fmt: skip
        rows = [_row(work, planned, results["ceilings"], name, programs[name], seconds[name])
                for name in programs]  # fmt: skip
        _forget(work, programs, peers)
        _print_rows(work, rows, say)
        timings += rows
        ratios += _ratios(work, rows, peer_gemm / gemm, say)
    results["timings"], results["ratios"] = timings, ratios
    results["absent"] = list(dict.fromkeys(absent))
    say(f"absent: {results['absent']}")
    return results


def _programs(
    work: Work, planned: Plan, peers, absent: list[str], broken: list[dict], say
) -> dict[str, Program]:
    programs: dict[str, Program] = {}
    for name in work.implementations:
        try:
            program = build(work, name, planned.dtype)
            program.run(0)  # memory may run out only now
            programs[name] = program
        except (NotImplementedError, ExceptionGroup, jax.errors.JaxRuntimeError) as reason:
            say(f"{work.op} {name}: not timed: {str(reason).splitlines()[0]}")
        # What should run here and breaks is a failed check; the others are still timed.
        except Exception as error:
            case = f"timing {work.passes} {work.case}: {type(error).__name__}: {error}"[:300]
            broken.append(checks.failure(work.op, name, case, planned.dtype))
            say(f"  FAILED {broken[-1]}")
    for name in work.peers:
        if name in PEERS:
            if peers is None:
                continue
            answer = peers.ask(make=name, case=work.case | _of_peer(work, planned))
            if not answer:
                programs[name] = Program(peers.program(name), 1, -1)
            elif "absent" in answer:
                absent.append(answer["absent"])
            else:
                say(f"{work.op} {work.passes} {name}: {answer['error']}")
        elif name.split()[0] not in absent:
            # Whatever somebody else's library raises is its answer, and not ours.
            try:
                program = jax_peer(name, work, planned.dtype)
                program.run(0)
                programs[name] = program
            except Exception as reason:
                line = (str(reason).splitlines() or [""])[0]
                say(f"{work.op} {work.passes} {name}: {type(reason).__name__}: {line[:200]}")
    return programs


def _of_peer(work: Work, planned: Plan) -> dict[str, Any]:
    return {"dtype": planned.dtype, "grad": work.grad}


def _forget(work: Work, programs: dict[str, Program], peers: Peers | None) -> None:
    for name in work.peers:
        if name in PEERS and name in programs and peers is not None:
            peers.ask(drop=name)


def _row(work: Work, planned: Plan, ceilings, name: str, program: Program, seconds) -> dict:
    flops, size = costs(work, jnp.dtype(planned.dtype).itemsize)
    floor_ms = 1e3 * max(flops / ceilings["gemm_tflops"], size / ceilings["copy_tbps"]) / 1e12
    timing = bench.summary(seconds, program.calls)
    return {
        "op": work.op, "impl": name, "case": work.case, "pass": work.passes,
        **dataclasses.asdict(timing),
        "tflops": flops / timing.median_ms / 1e9,
        "floor_ms": floor_ms, "of_floor": floor_ms / timing.median_ms,
        "peak_mem_mb": program.temporary_bytes / 1e6 if program.temporary_bytes >= 0 else None,
        "config": {},
    }  # fmt: skip


def _print_rows(work: Work, rows: list[dict], say) -> None:
    say(f"\n{work.op} {work.passes} {work.case}")
    for row in rows:
        memory = "" if row["peak_mem_mb"] is None else f"{row['peak_mem_mb']:9.1f} MB temporary"
        spread = f"min {row['min_ms']:.3f}, iqr {row['iqr_ms']:.3f}, {row['repeats']} times"
        of_floor = f"{row['of_floor']:6.1%} of floor"
        say(f"  {row['impl']:34} {row['median_ms']:10.3f} ms  ({spread})  {of_floor} {memory}")


def _ratios(work: Work, rows: list[dict], gemm_ratio: float, say) -> list[dict[str, Any]]:
    """How many times as long as our best each peer takes; beside it, for peers of torch, the same
    with both times counted in what a matrix product of their own library costs.
    """
    ours = [row for row in rows if row["impl"] in work.implementations]
    if not ours:
        return []
    best = min(ours, key=lambda row: row["median_ms"])
    found = []
    for row in rows:
        if row in ours:
            continue
        ratio = row["median_ms"] / best["median_ms"]
        entry = {
            "case": f"{work.op} {work.passes} {work.case}",
            "ours": best["impl"], "peer": row["impl"], "ratio": ratio,
        }  # fmt: skip
        found.append(entry)
        shown = ""
        if row["impl"] in PEERS:
            normal = ratio * gemm_ratio
            found.append(entry | {"peer": f"{row['impl']}, GEMM-normalised", "ratio": normal})
            shown = f", GEMM-normalised {normal:.2f}"
        say(f"  {row['impl']} / {best['impl']}: {ratio:.2f}{shown}")
    return found


def _use_all_cores() -> None:
    """A CPU device for each core, unless a number of them was chosen already."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.jax_num_cpu_devices == -1:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def main(arguments: list[str] | None = None) -> int:
    """0 if every check passed."""
    parser = argparse.ArgumentParser(prog="python -m kernels.suite", description=__doc__)
    parser.add_argument("--out", required=True, help="where the results go, JSON")
    parser.add_argument("--quick", action="store_true", help="less than two minutes")
    parser.add_argument("--peers", choices=("all", "none"), default="none")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has torch")
    given = parser.parse_args(arguments)
    _use_all_cores()
    # Two processes share the accelerator's memory; neither may take most of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    peers = Peers(given.peers_python) if given.peers == "all" else None
    if peers is not None and "absent" in peers.versions:
        peers = None
    try:
        results = run(plan(jax.default_backend(), quick=given.quick), peers)
    finally:
        if peers is not None:
            peers.close()
    pathlib.Path(given.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row["ok"] for row in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
