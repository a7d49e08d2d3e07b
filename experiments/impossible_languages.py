"""Trains models of each language on the same sentences, and compares families with their control.

Every language has as many steps, the same model and the same seeds. Perplexities are of sentences
that were not trained on, so they include what is random in a language: no model can predict a
permutation that is drawn for each sentence.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import parse_choice
from lminf.data.worlds import impossible
from lminf.data.worlds.world import World
from lminf.errors import InputError
from lminf.experiments import _worlds
from lminf.experiments._main import main
from lminf.experiments._small import Once
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.train.ensemble import Replicas
from lminf.train.step import State


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    finished = {"step": c.steps, "seed": c.seed + c.replicates - 1}  # of the last row of a language
    done = {row["language"] for row in out.rows() if finished.items() <= row.items()}
    out.keep(lambda row: row["language"] in done)
    tagged = (
        impossible.read_tagged(Path(c.text)) if c.text
        else impossible.sentences(c.sentences, seed=c.seed)
    )  # fmt: skip
    copies = None
    for name in c.languages:
        if name in done:
            continue
        language = parse_choice(name, impossible.LANGUAGES, what="language")
        world = impossible.world(tagged, language, held_out=c.test_sentences, seed=c.seed)
        copies = copies or _worlds.replicas(c, len(world.vocabulary) + 1)
        tokens = np.concatenate(world.documents("train"))
        data = [Once(tokens, c.length, c.batch, seed) for seed in copies.seeds]
        for step, state in _worlds.train(c, copies, data, every=c.evaluate_every, label=name):
            facts = {"language": name, "family": language.family, "step": step}
            for seed, measured in zip(copies.seeds, of_each(copies, state, world), strict=True):
                yield {**facts, "seed": seed, **measured}


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses a number of generated sentences where a text is read instead."""
    if c.text and "sentences" in given:
        raise InputError("--config.sentences counts those of the grammar, and --config.text names "
                         "a text instead of it; leave one of the two out")  # fmt: skip


def of_each(copies: Replicas, state: State, world: World) -> list[Row]:
    """Of every model: perplexity, the geometric mean over test sentences; of the hop languages also
    how much more surprising (nats) the next word would be in a marker's place than the marker is.
    """
    documents = [document[:-1] for document in world.documents("test")]  # without their ends
    tokens, targets, is_token = _worlds.padded(documents)

    def nll_of(targets: np.ndarray) -> np.ndarray:
        each = [
            np.broadcast_to(rows, (len(copies.seeds), *rows.shape)) for rows in (tokens, targets)
        ]
        return _worlds.measure(copies, _worlds.one_peak(state), *each)[0]

    nll = nll_of(targets)
    of_sentences = (nll * is_token).sum(-1) / is_token.sum(-1)
    rows: list[Row] = [
        {"perplexity": float(np.exp(mean)), "sentences": len(documents)}
        for mean in of_sentences.mean(-1)
    ]
    first = len(world.truth) - len(documents)
    places = [(question.subject - first, len(question.prompt))
              for question in world.questions["test"]]  # fmt: skip
    marked = np.array([(row, place) for row, place in places if place + 1 < is_token[row].sum()])
    if not len(marked):
        return rows
    row, place = marked.T
    without = targets.copy()
    without[row, place] = targets[row, place + 1]
    gain = (nll_of(without) - nll)[:, row, place].mean(-1)
    return [
        {**row, "marker_gain": float(more), "markers": len(marked)}
        for row, more in zip(rows, gain, strict=True)
    ]


def plot(rows: list[Row]) -> Figure:
    local = [{**row, "family": "local shuffle"} for row in rows
             if row["language"].startswith(("local", "control"))]  # fmt: skip
    not_local = [row for row in rows if not row["language"].startswith("local")]
    return plots.curves(
        [*local, *not_local], x="step", y="perplexity", by="language", panel="family",
        x_label="optimiser steps (steps)", y_label="test perplexity (per token)",
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Means over seeds after the last step, with the least and the largest seed's."""
    last = max(row["step"] for row in rows)
    lines = {}
    for row in rows:
        if row["step"] == last:
            lines.setdefault(row["language"], []).append(row)
    # The control of a family is the first of its languages.
    controls = {group[0]["family"]: group for group in reversed(lines.values())}
    return [
        {
            "family": group[0]["family"], "language": name, "seeds": len(group),
            "perplexity": _worlds.over_seeds([row["perplexity"] for row in group]),
            "times its control": _worlds.over_seeds([
                row["perplexity"] / control["perplexity"]
                for row in group for control in controls[row["family"]]
                if control["seed"] == row["seed"]
            ]),
            "marker gain (nats)": _worlds.over_seeds([
                row["marker_gain"] for row in group if "marker_gain" in row
            ]),
        }
        for name, group in lines.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
