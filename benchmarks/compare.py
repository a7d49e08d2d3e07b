"""lminf beside transformers on this machine: alternating runs, medians and ratios in one file.

    python benchmarks/compare.py --peer=.venv-parity/bin/python
    python benchmarks/compare.py --peer=… --length=2048 --context=512 --rounds=1      a quick look

Every measurement is a process of its own, and the two sides take turns, so that neither has the
quiet half of the time. Writes benchmarks/results/<date>-<commit>.json; ratios above 1 mean that
lminf is faster.
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

import numpy as np

from lminf.checkpoints import fetch
from lminf.data import sources
from lminf.lm.lm import LM
from lminf.run import environment

HERE = Path(__file__).parent
READ = ("full", "lm_infinite:window=4096,sinks=10", "lm_infinite:window=2048,sinks=10")
DECODE = ("full", "lm_infinite:window=4096,sinks=10")
MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a Python with torch and transformers")
    parser.add_argument("--work", nargs="+", choices=("read", "decode"), default=["read", "decode"])
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
        commands = peer_and_ours(args, ids)
        runs: dict[str, list[dict]] = {name: [] for name in commands}
        for turn in range(args.rounds):
            for name, command in commands.items():
                runs[name].append(measured(command))
                print(f"{turn + 1}/{args.rounds}  {name}  {headline(runs[name][-1])}", flush=True)
    described = environment.describe(environment.command_line())
    source = described["source"] or {}
    commit = source.get("commit") or "unknown"
    found = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "peer")},
        "summary": summary(runs),
        "runs": runs,
        # The whole difference from the commit would fill the file; that there is one, must be said.
        "environment": {
            **described,
            "source": {"commit": commit, "changed": bool(source.get("diff"))},
        },
    }
    out = args.out or HERE / "results" / f"{datetime.date.today()}-{commit[:7]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))
    print(out)


def peer_and_ours(args: argparse.Namespace, ids: Path) -> dict[str, list[str]]:
    """The commands to run, by name, in the order in which they take turns."""
    sizes = [f"--length={args.length}", f"--context={args.context}", f"--new={args.new}"]
    model = str(fetch.fetch(MODEL))
    peer = [args.peer, str(HERE / "peer_transformers.py")]
    ours = [sys.executable, str(HERE / "ours.py")]
    commands = {}
    for work in args.work:
        policies = {"read": READ, "decode": DECODE}[work]
        commands[f"{work} transformers"] = [*peer, work, f"--model={model}", f"--ids={ids}", *sizes]
        for policy in policies:
            commands[f"{work} {policy}"] = [*ours, work, f"--policy={policy}", *sizes]
    return commands


def measured(command: list[str]) -> dict:
    """What the command measured."""
    limited = {"OMP_NUM_THREADS": "2", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **limited}, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def cost(run: dict) -> float:
    """Seconds of a reading, or median milliseconds per token of a decoding."""
    return run["seconds"] if "seconds" in run else statistics.median(run["ms"])


def headline(run: dict) -> str:
    return f"{cost(run):.1f} {'s' if 'seconds' in run else 'ms/token'}"


def summary(runs: dict[str, list[dict]]) -> dict:
    """Median of each, how many times faster than the peer, and whether both computed the same."""
    found = {}
    for name, each in runs.items():
        work = name.split()[0]
        peer = runs[f"{work} transformers"]
        middle = statistics.median(map(cost, each))
        found[name] = {
            "seconds" if work == "read" else "ms_per_token": middle,
            "times_faster_than_transformers": statistics.median(map(cost, peer)) / middle,
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in each),
        }
        if work == "read":
            found[name]["nll"] = each[0]["nll"]
        else:
            found[name]["same_tokens"] = each[0]["wrote"] == peer[0]["wrote"]
    return found


if __name__ == "__main__":
    main()
