"""Trains one model under several policies, and then times their steps in turns.

Turns of one step each, so that other work on the machine slows all policies alike.
"""

import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.attention.parsing import parse_policy
from lminf.config import parse_choice
from lminf.data import sources, windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.evals import perplexity
from lminf.experiments import _training
from lminf.experiments._main import main
from lminf.models import spec
from lminf.parallel import mesh, partition
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import batches
from lminf.train.loop import fit
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.step import State, TrainStep

BLOCKS = 8  # of positions, with a loss each
TIMED = 8  # steps of each policy


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    rows = out.rows()
    if any(row["part"] == "speed" for row in rows):  # the last part
        return
    tokens = np.asarray(ByteTokenizer().encode(sources.text_of(c.text)))
    train, held_out = np.split(tokens, [round(len(tokens) * (1 - c.held_out))])
    data = windows.RandomWindows(train, length=c.length, rows=c.batch, seed=c.seed)
    measured = windows.consecutive(held_out, length=c.length, rows=c.batch, at_most=len(held_out))
    trainings = [Training(c, policy, data) for policy in c.policies]
    done = {row["policy"] for row in rows if row["part"] == "position"}
    out.keep(lambda row: row["policy"] in done)  # what an interrupted training left
    for training in trainings:
        if training.name not in done:
            yield from losses(c, training, measured)
    rounds = [[training.step() for training in trainings] for _ in range(TIMED + 1)]
    quartiles = np.percentile(rounds[1:], [25, 50, 75], axis=0).T  # the first of each compiles
    for training, (low, median, high) in zip(trainings, quartiles, strict=True):
        yield {"part": "speed", "policy": training.name, "ms_per_step": 1e3 * median,
               "low": 1e3 * low, "high": 1e3 * high, "steps": TIMED,
               "tokens_per_second": c.batch * c.length / median}  # fmt: skip


def losses(
    c: ConfigDict, training: "Training", measured: list[Mapping[str, np.ndarray]]
) -> Iterator[Row]:
    """Held-out losses along the training, and by position at its end."""
    with Progress(c.steps, label=training.name) as progress:
        for steps in _training.boundaries(0, [c.steps], c.evaluate_every):
            training.fit(steps, progress)
            nll = training.nll(measured)
            facts = {"policy": training.name, "step": steps}
            yield {"part": "loss", **facts, "loss": float(nll.mean(dtype=np.float64))}
    for block in perplexity.by_position(list(nll), block=-(-c.length // BLOCKS), first=0):
        yield {"part": "position", **facts, "start": block.start, "stop": block.stop,
               "loss": block.nll}  # fmt: skip


class Training:
    """A model in training under one policy, from the same parameters as the others."""

    def __init__(self, c: ConfigDict, policy: str, data: windows.RandomWindows) -> None:
        parsed = parse_policy(policy)
        shape = spec.llama(
            vocab_size=ByteTokenizer().vocab_size, trained_length=c.length, **c.model.to_dict()
        )
        schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
        self.name, self.data = parsed.name, data
        self.program = TrainStep(
            shape,
            policies.by_layer(parsed, windows=shape.windows, num_kv_heads=shape.num_kv_heads),
            mesh.make(mesh.MeshShape(), jax.local_devices()),
            partition.STRATEGIES["data"],
            parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
            lambda step: schedule(step, c.steps),
        )
        self.state: State = self.program.init(key=jax.random.key(c.seed))

    def put(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
        return batches.put(batch, mesh=self.program.mesh, strategy=self.program.strategy)

    def fit(self, steps: int, progress: Progress) -> None:
        """Trains until so many steps are done."""
        self.state = fit(
            self.program.step,
            self.state,
            lambda step: self.put(self.data.batch(step)),
            steps=steps,
            watch=lambda done, metrics: progress.update(done, loss=float(metrics.loss)),
        )

    def step(self) -> float:
        """Seconds of one more step."""
        batch = self.put(self.data.batch(int(self.state.step)))
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.program.step(self.state, batch))
        return time.perf_counter() - started

    def nll(self, measured: list[Mapping[str, np.ndarray]]) -> np.ndarray:
        """[rows, T], nats."""
        return np.concatenate(
            [np.asarray(self.program.nll(self.state, self.put(batch))) for batch in measured]
        )


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    return {
        "train_attention": plots.curves(
            [row for row in rows if row["part"] == "loss"], x="step", y="loss", by="policy",
            x_label="optimiser steps (steps)", y_label="held-out loss (nats/token)",
        ),
        "by_position": plots.curves(
            [row for row in rows if row["part"] == "position"], x="stop", y="loss", by="policy",
            x_label="position (tokens)", y_label="held-out loss (nats/token)",
        ),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Loss after each number of steps, by position at the end, and the speed."""
    columns = {"loss": "after {step:,}", "position": "{start}–{stop}"}
    named = [
        {**row, "column": column.format(**row)}
        for part, column in columns.items() for row in rows if row["part"] == part
    ]  # fmt: skip
    speed = {row["policy"]: row["tokens_per_second"] for row in rows if row["part"] == "speed"}
    return [
        {**line, "tokens/s": speed.get(line["policy"])}
        for line in tables.pivot(named, index="policy", columns="column", value="loss")
    ]


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
