"""lminf beside transformers and llama.cpp on this machine: alternating runs, medians and ratios.

    python -m benchmarks.compare --peer=PYTHON
    python -m benchmarks.compare --peer=PYTHON --length=2048 --context=512 --rounds=1   a quick look

PYTHON has what the extra `benchmarks` names. Every measurement is a process of its own, and the
sides take turns, so that none has the quiet half of the time. Writes
benchmarks/results/<date>-<commit>.json; ratios above 1 mean that lminf is faster.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lminf.checkpoints import fetch
from lminf.data import sources
from lminf.lm.lm import LM
from lminf.run import environment

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
FULL, LAMBDA, NARROW = (
    "full", "lm_infinite:window=4096,sinks=10", "lm_infinite:window=2048,sinks=10",
)  # fmt: skip
SHORT = "full, 8,190 tokens"
PEERS = {  # name -> script and its further arguments
    "transformers": ("peer_transformers.py", ()),
    "transformers bfloat16": ("peer_transformers.py", ("--dtype=bfloat16",)),
    "llama.cpp": ("peer_llama_cpp.py", ()),
}
OURS = {  # name -> arguments of ours.py
    FULL: (f"--policy={FULL}",),
    LAMBDA: (f"--policy={LAMBDA}",),
    NARROW: (f"--policy={NARROW}",),
    "full bfloat16": (f"--policy={FULL}", "--dtype=bfloat16"),
    "full int8": (f"--policy={FULL}", "--weights=int8"),
    "lm_infinite bfloat16": (f"--policy={LAMBDA}", "--dtype=bfloat16"),
    SHORT: (f"--policy={FULL}",),  # as much as llama.cpp reads
}


class Goal(NamedTuple):
    """That one side is so many times as fast as another, or needs so many times its memory."""

    work: str
    ours: str
    peer: str
    least: float | None = None  # times faster
    memory: float | None = None  # the most times its peak memory


GOALS = (
    Goal("read", FULL, "transformers", least=1.5),
    Goal("read", LAMBDA, "transformers", least=2.5),
    Goal("read", NARROW, "transformers", least=3.4),
    Goal("read", FULL, "transformers", memory=1.2),
    Goal("read", "full bfloat16", "transformers bfloat16", least=1.0),
    Goal("read", SHORT, "llama.cpp", least=1.8),
    Goal("decode", FULL, "transformers", least=2.0),
    Goal("decode", LAMBDA, "transformers", least=2.0),
    Goal("decode", "full bfloat16", FULL, least=1.0),
    Goal("decode", "full bfloat16", "transformers bfloat16", least=1.0),
    Goal("decode", FULL, "llama.cpp", least=0.45),
    Goal("decode", "full int8", "llama.cpp", least=0.45),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a Python with the extra `benchmarks`")
    parser.add_argument("--work", nargs="+", choices=("read", "decode"), default=["read", "decode"])
    parser.add_argument("--only", nargs="+", choices=(*PEERS, *OURS), help="some of the sides")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the file to write")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # two cores for each process started here, as the peer has
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        length = max(args.length, args.context)
        np.save(ids, LM.from_pretrained(MODEL).encode(sources.text_of(None), length=length)[0])
        commands = peers_and_ours(args, ids)
        runs: dict[tuple[str, str], list[dict]] = {name: [] for name in commands}
        for turn in range(args.rounds):
            for name, command in commands.items():
                runs[name].append(measured(command))
                line = f"{' '.join(name)}  {headline(runs[name][-1])}"
                print(f"{turn + 1}/{args.rounds}  {line}", flush=True)
    described = environment.describe(environment.command_line())
    source = described["source"] or {}
    commit = source.get("commit") or "unknown"
    results = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "peer")},
        "summary": {" ".join(name): summary(each) for name, each in runs.items()},
        "goals": [reached(goal, runs) for goal in GOALS if measures(goal, runs)],
        "runs": {" ".join(name): each for name, each in runs.items()},
        # The whole difference from the commit would fill the file; that there is one, must be said.
        "environment": {
            **described,
            "source": {"commit": commit, "changed": bool(source.get("diff"))},
        },
    }
    out = args.out or HERE / "results" / f"{datetime.date.today()}-{commit[:7]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"summary": results["summary"], "goals": results["goals"]}, indent=1))
    print(out)


def peers_and_ours(args: argparse.Namespace, ids: Path) -> dict[tuple[str, str], list[str]]:
    """The commands to run, by work and side, in the order in which they take turns."""
    sizes = [f"--length={args.length}", f"--context={args.context}", f"--new={args.new}"]
    model = str(fetch.fetch(MODEL))
    commands = {}
    for work in args.work:
        for name, (script, more) in PEERS.items():
            given = [f"--model={model}", f"--ids={ids}", *sizes, *more]
            commands[work, name] = [args.peer, str(HERE / script), work, *given]
        for name, more in OURS.items():
            if name == SHORT and work == "decode":
                continue
            if name == SHORT:
                more = (*more, f"--length={min(args.length, 8190)}")
            commands[work, name] = [sys.executable, str(HERE / "ours.py"), work, *sizes, *more]
    return {key: each for key, each in commands.items() if not args.only or key[1] in args.only}


def measured(command: list[str]) -> dict[str, Any]:
    """What the command measured."""
    limited = {"OMP_NUM_THREADS": "2", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **limited}, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def cost(run: dict[str, Any]) -> float:
    """Milliseconds per token: of a reading the mean, of a decoding the median."""
    return (
        1e3 * run["seconds"] / run["tokens"] if "seconds" in run else statistics.median(run["ms"])
    )


def headline(run: dict[str, Any]) -> str:
    return f"{cost(run):.2f} ms/token"


def summary(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest of a side's costs, its peak memory, and what it computed."""
    costs = [cost(run) for run in each]
    return {
        "ms_per_token": statistics.median(costs),
        "range": [min(costs), max(costs)],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in each),
        **{name: each[0][name] for name in ("nll", "wrote") if name in each[0]},
    }


def measures(goal: Goal, runs: dict[tuple[str, str], list[dict]]) -> bool:
    return {(goal.work, goal.ours), (goal.work, goal.peer)} <= set(runs)


def reached(goal: Goal, runs: dict[tuple[str, str], list[dict]]) -> dict[str, Any]:
    """The goal, what was measured, and whether it is reached. Ratios are of runs that took turns:
    the median over rounds, and their range.
    """
    ours, peer = runs[goal.work, goal.ours], runs[goal.work, goal.peer]
    if goal.memory is not None:
        sides = [max(run["peak_memory_bytes"] for run in each) for each in (ours, peer)]
        ratio = sides[0] / sides[1]
        found = {"at_most_times_the_memory": goal.memory, "measured": ratio}
        return {**named(goal), **found, "reached": ratio <= goal.memory}
    assert goal.least is not None
    ratios = [cost(b) / cost(a) for a, b in zip(ours, peer, strict=True)]
    ratio = statistics.median(ratios)
    found = {"times_faster": goal.least, "measured": ratio, "range": [min(ratios), max(ratios)]}
    return {**named(goal), **found, "reached": ratio >= goal.least}


def named(goal: Goal) -> dict[str, str]:
    return {"work": goal.work, "ours": goal.ours, "peer": goal.peer}


if __name__ == "__main__":
    main()
