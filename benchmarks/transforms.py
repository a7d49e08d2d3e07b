"""Training speed with transforms of rows beside the same rows without: data must not wait.

    python -m benchmarks.transforms --out benchmarks/results/transforms.jsonl

Writes a row for each transform: seconds of a step, by quartiles, and the speed as a share of that
without, by rounds. All take turns in one process, step by step, each with its own prefetching, so
that a busy moment of the machine falls on all alike. Two minutes on two CPU cores.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lminf.checkpoints import fetch
from lminf.configs import train_lm
from lminf.data import store
from lminf.data.loader import Loader, Prefetched, parse_plan, parse_transforms
from lminf.experiments.train_throughput import program
from lminf.parallel import mesh
from lminf.run import devices, environment
from lminf.train import batches
from lminf.train.step import TrainStep

END, VOCAB = 256, 257
KNOTS = f"untie_the_knots:end_id={END},knot_ids=(248,249,250,251),weights=(0,1)"
TRACED = (
    f"{KNOTS},backtracing=(Backtracing:open_id=252,close_id=253,open_list_id=254,"
    f"separator_id=255,close_list_id=247,characters=({','.join(map(str, range(48, 58)))}))"
)
TRANSFORMS = {
    "none": "", "untie_the_knots": KNOTS, "with backtracing": TRACED,
    "per_sequence": "per_sequence",
}  # fmt: skip
DOCUMENT = 200  # tokens of a document, on average
STORED = 2_000_000  # tokens
BATCHES = 16  # whose making is timed without a model


class Run:
    """A model in training on transformed rows."""

    def __init__(self, program: TrainStep, transforms: str, *, length: int, rows: int) -> None:
        self.program = program
        rng = np.random.default_rng(0)
        sizes = rng.geometric(1 / DOCUMENT, STORED // DOCUMENT)
        corpus = store.from_documents([np.append(rng.integers(0, 200, n), END) for n in sizes])
        self.loader = Loader([corpus], parse_plan("concat"), length=length, rows=rows, seed=0,
                             transforms=parse_transforms(transforms, vocab_size=VOCAB))  # fmt: skip
        self.data = Prefetched(self.loader)
        self.state = self.program.init(key=jax.random.key(0))
        self.done = 0

    def step(self) -> float:
        """Seconds of the next step, its batch included."""
        started = time.perf_counter()
        place = {"mesh": self.program.mesh, "strategy": self.program.strategy}
        batch = batches.put(self.data.batch(self.done), **place)
        self.state, _ = jax.block_until_ready(self.program.step(self.state, batch))
        self.done += 1
        return time.perf_counter() - started

    def making(self) -> float:
        """Processor seconds of a batch's making."""
        started = time.thread_time()
        for step in range(BATCHES):
            self.loader.batch(step)
        return (time.thread_time() - started) / BATCHES


def measured(*, length: int, rows: int, rounds: int) -> Iterator[dict[str, Any]]:
    shape = train_lm.get_config("tiny").model  # the smaller a model, the less time data have
    shared = program(shape, VOCAB, length, mesh.make(mesh.MeshShape()))
    runs = {name: Run(shared, text, length=length, rows=rows) for name, text in TRANSFORMS.items()}
    times = np.array([[run.step() for run in runs.values()] for _ in range(rounds + 2)])[2:]
    share = times[:, :1] / times  # of the same round, speed beside that without
    for index, (name, run) in enumerate(runs.items()):
        low, median, high = np.percentile(times[:, index], [25, 50, 75])
        ratio = np.percentile(share[:, index], [25, 50, 75])
        yield {
            "transforms": name, "length": length, "rows": rows, "rounds": rounds,
            "seconds": median, "low": low, "high": high, "speed_share": ratio[1],
            "share_low": ratio[0], "share_high": ratio[2], "making_seconds": run.making(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (4)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that are timed (20)")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to write")
    args = parser.parse_args()
    devices.configure(fetch.compiled_folder())
    rows = [
        {"processor": environment.cpu_model(), **row}
        for row in measured(length=args.length, rows=args.rows, rounds=args.rounds)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if args.out:
        args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
