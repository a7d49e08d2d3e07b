"""Trains one model under several policies, and then times their steps in turns."""

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.data import sources, windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.evals import perplexity
from lminf.experiments import _policy_training, _training
from lminf.experiments._main import main
from lminf.experiments._policy_training import Training
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

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
    trainings = {
        policy.name: Training(_policy_training.program(c, policy), data, seed=c.seed)
        for policy in map(parse_policy, c.policies)
    }
    done = {row["policy"] for row in rows if row["part"] == "position"}
    out.keep(lambda row: row["policy"] in done)  # what an interrupted training left
    for name, training in trainings.items():
        if name not in done:
            yield from losses(c, name, training, measured)
    quartiles = _policy_training.quartiles(list(trainings.values()), TIMED)
    for name, (low, median, high) in zip(trainings, quartiles, strict=True):
        yield {"part": "speed", "policy": name, "ms_per_step": 1e3 * median,
               "low": 1e3 * low, "high": 1e3 * high, "steps": TIMED,
               "tokens_per_second": c.batch * c.length / median}  # fmt: skip


def losses(
    c: ConfigDict, name: str, training: Training, measured: list[Mapping[str, np.ndarray]]
) -> Iterator[Row]:
    """Held-out losses along the training, and by position at its end."""
    with Progress(c.steps, label=name) as progress:
        for steps in _training.boundaries(0, [c.steps], c.evaluate_every):
            training.fit(steps, progress)
            nll = training.nll(measured)
            facts = {"policy": name, "step": steps}
            yield {"part": "loss", **facts, "loss": float(nll.mean(dtype=np.float64))}
    for block in perplexity.by_position(list(nll), block=-(-c.length // BLOCKS), first=0):
        yield {"part": "position", **facts, "start": block.start, "stop": block.stop,
               "loss": block.nll}  # fmt: skip


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
