"""Trains one model under several policies, in turns so that a busy machine slows all alike."""

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


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    tokens = np.asarray(ByteTokenizer().encode(sources.text_of(c.text)))
    train, held_out = np.split(tokens, [round(len(tokens) * (1 - c.held_out))])
    data = windows.RandomWindows(train, length=c.length, rows=c.batch, seed=c.seed)
    measured = windows.consecutive(held_out, length=c.length, rows=c.batch, at_most=len(held_out))
    trainings = [Training(c, policy) for policy in c.policies]
    with Progress(c.steps, label="training", unit="steps of each") as progress:
        for steps in _training.boundaries(0, c.steps, c.evaluate_every):
            for training in trainings:
                speed = training.fit(data, steps)
                nll = training.nll(measured)
                facts = {"policy": training.name, "step": steps}
                yield {"part": "loss", **facts, "loss": float(nll.mean(dtype=np.float64)),
                       "tokens_per_second": c.batch * c.length * speed}  # fmt: skip
                if steps == c.steps:
                    size = -(-c.length // BLOCKS)
                    for block in perplexity.by_position(list(nll), block=size, first=0):
                        yield {"part": "position", **facts, "start": block.start,
                               "stop": block.stop, "loss": block.nll}  # fmt: skip
            progress.update(steps)


class Training:
    """A model in training under one policy, from the same parameters as the others."""

    def __init__(self, c: ConfigDict, policy: str) -> None:
        parsed = parse_policy(policy)
        shape = spec.llama(
            vocab_size=ByteTokenizer().vocab_size, trained_length=c.length, **c.model.to_dict()
        )
        schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
        self.name = parsed.name
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

    def fit(self, data: windows.RandomWindows, steps: int) -> float:
        """Trains until so many steps are done; steps per second, the one that compiles aside."""
        if int(self.state.step) == 0:
            self.state, _ = self.program.step(self.state, self.put(data.batch(0)))
        jax.block_until_ready(self.state)
        done, started = int(self.state.step), time.perf_counter()
        self.state = fit(
            self.program.step, self.state, lambda step: self.put(data.batch(step)), steps=steps
        )
        jax.block_until_ready(self.state)
        return (steps - done) / (time.perf_counter() - started)

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
    """Loss after each number of steps, by position at the end, and the best speed."""
    losses = [{**row, "step": f"after {row['step']:,}"} for row in rows if row["part"] == "loss"]
    positions = [{**row, "tokens": f"{row['start']}–{row['stop']}"} for row in rows
                 if row["part"] == "position"]  # fmt: skip
    by_position = tables.pivot(positions, index="policy", columns="tokens", value="loss")
    speed: dict[str, float] = {}  # of the part that other programs on the machine slowed least
    for row in losses:
        speed[row["policy"]] = max(row["tokens_per_second"], speed.get(row["policy"], 0.0))
    return [
        {**line, **at_the_end, "tokens/s": speed[line["policy"]]}
        for line, at_the_end in zip(
            tables.pivot(losses, index="policy", columns="step", value="loss"), by_position,
            strict=True,
        )
    ]  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table)
