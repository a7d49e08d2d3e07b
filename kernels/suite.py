"""One command on any machine: what it can do at best, whether our kernels are right, how fast they
and their peers are, in one run.

    python -m lminf.kernels.suite --out results.json [--quick] [--peers all] [--peers-python PYTHON]
    python -m lminf.kernels.suite --out results.json --cores 1 ...    on one core of a CPU

Beside each ratio to a peer stands its ceiling: what it would be if ours did its products, without
which it cannot do, at the rate of one large product, and nothing else.

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
from typing import Any

import jax
import jax.numpy as jnp

from lminf.kernels import checks, programs
from lminf.kernels.common import bench
from lminf.kernels.peers import PEERS, Peers
from lminf.kernels.programs import BY_HEADS, Program, Work


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
NATIVE = {"cpu": (), "gpu": ("triton",), "tpu": ("mosaic_tpu",)}


def plan(platform: str, *, quick: bool) -> Plan:
    """The sizes of the specification: small ones on a CPU, a model's on an accelerator."""
    cpu = platform == "cpu"
    ours = (*NATIVE.get(platform, ()), "xla_chunked")
    attend_ours = (*ours, "mosaic_gpu") if platform == "gpu" else ours
    if cpu and jax.device_count() > 1:
        attend_ours += (BY_HEADS,)
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
            case = {"T": length} | shape
            work.append(Work("lambda_attention", case, grad, attend_ours, attention))
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
    folder = pathlib.Path(__file__).parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
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
    checked = [
        row
        for seed in planned.seeds
        for row in checks.check(checks.cases(seed), planned.check_dtypes, refused)
    ]
    failed = [row for row in checked if not row["ok"]]
    say(f"{len(checked)} checks, {len(failed)} failed")
    for row in failed:
        say(f"  FAILED {row}")
    for name, reason in refused.items():
        say(f"  not here: {name}: {reason}")
    results["checks"] = checked

    timings: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for work in planned.work:
        candidates = _candidates(work, planned, peers, absent, checked, say)
        seconds = bench.interleaved(
            {name: program.run for name, program in candidates.items()},
            repeats=planned.repeats, budget_s=planned.budget_s, warmup=0,
        )  # fmt: skip
        rows = [_row(work, planned, results["ceilings"], name, candidates[name], seconds[name])
                for name in candidates]  # fmt: skip
        _forget(work, candidates, peers)
        _print_rows(work, rows, say)
        timings += rows
        ratios += _ratios(work, rows, peer_gemm / gemm, say)
    results["timings"], results["ratios"] = timings, ratios
    results["absent"] = list(dict.fromkeys(absent))
    say(f"absent: {results['absent']}")
    return results


def _candidates(
    work: Work, planned: Plan, peers, absent: list[str], broken: list[dict], say
) -> dict[str, Program]:
    built: dict[str, Program] = {}
    for name in work.implementations:
        try:
            program = programs.build(work, name, planned.dtype)
            program.run(0)  # memory may run out only now
            built[name] = program
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
                built[name] = Program(peers.program(name), 1, -1, {})
            elif "absent" in answer:
                absent.append(answer["absent"])
            else:
                say(f"{work.op} {work.passes} {name}: {answer['error']}")
        elif name.split()[0] not in absent:
            # Whatever somebody else's library raises is its answer, and not ours.
            try:
                program = programs.jax_peer(name, work, planned.dtype)
                program.run(0)
                built[name] = program
            except Exception as reason:
                line = (str(reason).splitlines() or [""])[0]
                say(f"{work.op} {work.passes} {name}: {type(reason).__name__}: {line[:200]}")
    return built


def _of_peer(work: Work, planned: Plan) -> dict[str, Any]:
    return {"dtype": planned.dtype, "grad": work.grad}


def _forget(work: Work, built: dict[str, Program], peers: Peers | None) -> None:
    for name in work.peers:
        if name in PEERS and name in built and peers is not None:
            peers.ask(drop=name)


def _row(work: Work, planned: Plan, ceilings, name: str, program: Program, seconds) -> dict:
    flops, size = programs.costs(work, jnp.dtype(planned.dtype).itemsize)
    floor_ms = 1e3 * max(flops / ceilings["gemm_tflops"], size / ceilings["copy_tbps"]) / 1e12
    timing = bench.summary(seconds, program.calls)
    return {
        "op": work.op, "impl": name, "case": work.case, "pass": work.passes,
        **dataclasses.asdict(timing),
        "tflops": flops / timing.median_ms / 1e9,
        "floor_ms": floor_ms, "of_floor": floor_ms / timing.median_ms,
        "peak_mem_mb": program.temporary_bytes / 1e6 if program.temporary_bytes >= 0 else None,
        "config": program.config,
    }  # fmt: skip


def _print_rows(work: Work, rows: list[dict], say) -> None:
    say(f"\n{work.op} {work.passes} {work.case}")
    for row in rows:
        memory = "" if row["peak_mem_mb"] is None else f"{row['peak_mem_mb']:9.1f} MB temporary"
        spread = f"min {row['min_ms']:.3f}, iqr {row['iqr_ms']:.3f}, {row['repeats']} times"
        of_floor = f"{row['of_floor']:6.1%} of floor"
        say(f"  {row['impl']:34} {row['median_ms']:10.3f} ms  ({spread})  {of_floor} {memory}")


def _ratios(work: Work, rows: list[dict], gemm_ratio: float, say) -> list[dict[str, Any]]:
    """How many times as long as our best each peer takes, and would take if our best ran at its
    floor; beside it, for peers of torch, the same with both times counted in what a matrix product
    of their own library costs.
    """
    ours = [row for row in rows if row["impl"] in work.implementations]
    if not ours:
        return []
    best = min(ours, key=lambda row: row["median_ms"])
    ratios = []
    for row in rows:
        if row in ours:
            continue
        ratio, ceiling = row["median_ms"] / best["median_ms"], row["median_ms"] / best["floor_ms"]
        entry = {
            "case": f"{work.op} {work.passes} {work.case}",
            "ours": best["impl"], "peer": row["impl"], "ratio": ratio,
            "ceiling": ceiling,
        }  # fmt: skip
        ratios.append(entry)
        shown = ""
        if row["impl"] in PEERS:
            normal = {"ratio": ratio * gemm_ratio, "ceiling": ceiling * gemm_ratio}
            ratios.append(entry | {"peer": f"{row['impl']}, GEMM-normalised"} | normal)
            shown = f"; GEMM-normalised {normal['ratio']:.2f} ({normal['ceiling']:.2f})"
        say(f"  {row['impl']} / {best['impl']}: {ratio:.2f} (ceiling {ceiling:.2f}){shown}")
    return ratios


def _use_all_cores() -> None:
    """A CPU device for each core, unless a number of them was chosen already."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.jax_num_cpu_devices == -1:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def main(arguments: list[str] | None = None) -> int:
    """0 if every check passed."""
    parser = argparse.ArgumentParser(prog="python -m lminf.kernels.suite", description=__doc__)
    parser.add_argument("--out", required=True, help="where the results go, JSON")
    parser.add_argument("--quick", action="store_true", help="less than two minutes")
    parser.add_argument("--peers", choices=("all", "none"), default="none")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--cores", type=int, help="of a CPU, that this run and its peers may use")
    given = parser.parse_args(arguments)
    if given.cores is not None:  # before a thread pool counts them; the peers' process inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
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
