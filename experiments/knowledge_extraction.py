"""Trains models on everybody's biographies and half of the people's questions, all from the start,
and asks for the other half. A greedy answer is right where every word of it is the likeliest one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import from_config
from lminf.data.worlds import bios
from lminf.data.worlds.bios import ATTRIBUTES, Bios
from lminf.data.worlds.world import END, World
from lminf.experiments import _probes, _worlds
from lminf.experiments._main import main
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.train.ensemble import Replicas
from lminf.types import Params

LABELS = ("birth_month", *ATTRIBUTES[1:])  # what probes classify: of the date, the month
P_RANK, Q_RANK = 2, 16  # of the change of the embedding
# Per cent, of 100,000 people and GPT-2 small: the setting of the pod form.
BIOGRAPHIES, ASKED, HELD_OUT = "biographies", "questions trained on", "questions of test people"
P_PROBE, Q_PROBE = "P-probe at the first value", "Q-probe"
# Shares, of 100,000 people and GPT-2 small: the setting of the pod form.
PUBLISHED = {
    ("single", HELD_OUT): 0.097,
    ("multi5+permute+fullname", HELD_OUT): 0.966,
    ("single", Q_PROBE): 0.03,
    ("multi5+permute", Q_PROBE): 0.9258,
    ("multi5+permute", P_PROBE): 0.9356,
}


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    last = {"measure": Q_PROBE, "seed": c.seed + c.replicates - 1, "attribute": LABELS[-1]}
    done = {row["augmentation"] for row in out.rows() if last.items() <= row.items()}
    out.keep(lambda row: row["augmentation"] in done)
    copies = None
    for name in c.augmentations:
        if name in done:
            continue
        augmentation, sizes = bios.parse_augmentation(name), from_config(c.sizes, bios.Sizes)
        people = [Bios(c.people, c.seed + i, augmentation, sizes) for i in range(c.replicates)]
        worlds = [each.world() for each in people]
        copies = copies or _worlds.replicas(c, len(worlds[0].vocabulary) + 1)
        data = [
            Mixed(world.documents("train"), world.documents("questions_train"), c.question_share,
                  length=c.length, rows=c.batch, seed=seed)
            for world, seed in zip(worlds, copies.seeds, strict=True)
        ]  # fmt: skip
        (_, state), = _worlds.train(c, copies, data, every=c.steps, label=name)  # fmt: skip
        yield from (
            {"augmentation": name, "scale": "published", "measure": measure, "accuracy": share}
            for (named, measure), share in PUBLISHED.items() if named == name
        )  # fmt: skip
        for row in measures(c, copies, _worlds.one_peak(state), worlds, people):
            yield {"augmentation": name, "scale": "scaled down", **row}


@dataclass(frozen=True)
class Mixed:
    """Rows of biographies, and a share of rows of questions: drawn anew for each row, one after
    another with their ends between them.
    """

    biographies: Sequence[Int[np.ndarray, " _"]]
    questions: Sequence[Int[np.ndarray, " _"]]
    share: float
    length: int
    rows: int
    seed: int

    def documents(self, step: int) -> list[int]:
        """Seeds of the rows of a step."""
        return list(range(step * self.rows, (step + 1) * self.rows))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rows = np.stack([self._row(number) for number in self.documents(step)])
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    def _row(self, number: int) -> Int[np.ndarray, " T"]:
        rng = np.random.default_rng((self.seed, number))
        documents = self.questions if rng.random() < self.share else self.biographies
        row = [np.zeros(1, np.int32)]  # what ends the document before
        while sum(map(len, row)) <= self.length:
            row.append(documents[int(rng.integers(len(documents)))])
        return np.concatenate(row)[: self.length + 1]


def measures(
    c: ConfigDict, copies: Replicas, params: Params, worlds: Sequence[World], people: Sequence[Bios]
) -> Iterator[Row]:
    """Shares of right values of `n` people, for each seed and attribute: as biographies continue,
    as answers, and by probes.
    """
    num_train, persons = people[0].num_train, range(people[0].people)
    encode = worlds[0].encode  # all have one vocabulary
    texts = [world.biography(person, 0) for world in people for person in persons]
    biographies = [encode(text.words) for text in texts]
    spans = np.array([[text.values[name] for name in ATTRIBUTES] for text in texts])
    questions = [world.question(person, name) for world in people for person in persons
                 for name in ATTRIBUTES]  # fmt: skip
    answers = [(len(q.prompt), len(q.prompt) + len(q.answer)) for q in questions]
    recited = right(copies, params, biographies, spans)
    answered = right(copies, params, [encode(q.prompt + q.answer) for q in questions],
                     np.array(answers)[:, None])  # fmt: skip
    groups = {BIOGRAPHIES: (recited, persons), ASKED: (answered, persons[:num_train]),
              HELD_OUT: (answered, persons[num_train:])}  # fmt: skip
    for measure, (kinds, group) in groups.items():
        exact, first = (kind.reshape(len(people), len(persons), -1)[:, group] for kind in kinds)
        for s, a in np.ndindex(len(people), len(ATTRIBUTES)):
            yield {"measure": measure, "seed": copies.seeds[s], "attribute": ATTRIBUTES[a],
                   "accuracy": float(exact[s, :, a].mean()),
                   "first_word": float(first[s, :, a].mean()),
                   "n": len(group)}  # fmt: skip
    labels = np.stack([[world.labels[name] for name in LABELS] for world in people]).swapaxes(1, 2)
    names = [encode((*world.name(person), END)) for world in people for person in persons]
    firsts = spans[..., 0].min(1)
    prefixes = [text[:first] for text, first in zip(biographies, firsts, strict=True)]
    for probe, documents, rank in ((P_PROBE, prefixes, P_RANK), (Q_PROBE, names, Q_RANK)):
        # The state behind the last word: a row has one token more than its document.
        tokens, _, _ = _worlds.padded([np.append(document, 0) for document in documents])
        places = np.array([len(document) for document in documents])
        shares = _probes.accuracies(
            c.probe, copies.program, params, by_seed(tokens, people), by_seed(places, people),
            labels, num_train=num_train, rank=rank,
        )  # fmt: skip
        for s, a in np.ndindex(shares.shape):
            yield {"measure": probe, "seed": copies.seeds[s], "attribute": LABELS[a],
                   "accuracy": float(shares[s, a]), "n": len(persons) - num_train}  # fmt: skip


def right(
    copies: Replicas,
    params: Params,
    documents: Sequence[np.ndarray],
    spans: Int[np.ndarray, "N A 2"],
) -> tuple[np.ndarray, np.ndarray]:
    """Whether all words of each span, and whether its first, are the likeliest: [seeds, N, A]."""
    tokens, targets, _ = (by_seed(each, copies.seeds) for each in _worlds.padded(documents))
    _, best = _worlds.measure(copies, params, tokens, targets)
    spans = by_seed(spans, copies.seeds)
    until = np.pad(best.cumsum(-1), ((0, 0), (0, 0), (1, 0)))
    first, end = spans[..., 0], spans[..., 1]
    count = np.take_along_axis(until, end, -1) - np.take_along_axis(until, first, -1)
    return count == end - first, np.take_along_axis(best, first, -1)


def by_seed(rows: np.ndarray, seeds: Sequence) -> np.ndarray:
    """[seeds · N, ...] -> [seeds, N, ...]."""
    return rows.reshape(len(seeds), -1, *rows.shape[1:])


def means(rows: list[Row]) -> list[Row]:
    """A row for each augmentation, measure and seed: the mean over attributes."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if row["scale"] == "scaled down":
            key = row["augmentation"], row["measure"], row["seed"]
            groups.setdefault(key, []).append(row["accuracy"])
    return [
        {"augmentation": name, "measure": measure, "seed": seed, "accuracy": float(np.mean(values))}
        for (name, measure, seed), values in groups.items()
    ]  # fmt: skip


def plot(rows: list[Row]) -> Figure:
    return plots.bars(
        means(rows), x="augmentation", y="accuracy", by="measure", center=np.mean, x_label="",
        y_label="right values (share, mean over attributes)",
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Means over attributes and seeds, with the least and the largest seed's; and, from 100,000
    people, what the paper has.
    """
    scaled = means(rows)
    names = list(dict.fromkeys(row["augmentation"] for row in scaled))
    published = {(row["augmentation"], row["measure"]): row["accuracy"] for row in rows
                 if row["scale"] == "published"}  # fmt: skip
    lines = []
    for measure in dict.fromkeys(row["measure"] for row in scaled):
        line: Row = {"right values": measure}
        for name in names:
            of_seeds = [row["accuracy"] for row in scaled
                        if (row["augmentation"], row["measure"]) == (name, measure)]  # fmt: skip
            line[f"{name}, scaled down"] = _worlds.over_seeds(of_seeds)
            line[f"{name}, published"] = published.get((name, measure))
        lines.append(line)
    return lines


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
