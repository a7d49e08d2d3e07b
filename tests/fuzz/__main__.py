"""python -m tests.fuzz: see the package."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import run


def main() -> int:
    """Reads the damaged inputs and prints every failure; 1 if there was one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--target", choices=run.names(), action="append", help="may repeat")
    parser.add_argument("--inputs", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="this input alone, in this process")
    args = parser.parse_args()
    chosen = args.target or run.names()
    if args.only is not None:
        return again(chosen[0], args.only, seed=args.seed)
    failures, started = 0, time.monotonic()
    for target in chosen:
        inputs = run.share(target, args.inputs // len(chosen))
        since = time.monotonic()
        count = 0
        for failure in run.fuzz(target, inputs=inputs, seed=args.seed, workers=args.workers):
            count += 1
            print(f"{target} {failure.number}: {shortened(failure.text)}", flush=True)
        failures += count
        spent = time.monotonic() - since
        print(f"{target}: {inputs} inputs, {count} failures, {spent:.0f} s", flush=True)
    print(f"{failures} failures in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


def shortened(text: str) -> str:
    """The innermost frame of a traceback and its message, on one line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    frames = [line for line in lines if line.startswith("File ")]
    return " ".join([*frames[-1:], lines[-1]])


def again(target: str, number: int, *, seed: int) -> int:
    """One input again; its file stays."""
    module = run.load(target)
    folder = Path(tempfile.mkdtemp(prefix=f"lminf-fuzz-{target}-{number}-"))
    (folder / "seeds").mkdir()
    (folder / "damaged").mkdir()
    module.seeds(folder / "seeds")
    path = run.damaged(module, folder / "seeds", number, seed=seed, folder=folder / "damaged")
    print(path)
    module.read(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
