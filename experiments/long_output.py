"""How long a small model writes, by the longest output that it was fine-tuned on.

Numbers are single characters. A request is a number; the answer counts up to it and ends. Before it
is fine-tuned a model is trained on texts that count on without an end, so it can write more than
the longest answer that it will see.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest
from lminf.data.tokenizers import ByteTokenizer
from lminf.data.transforms import PerSequence
from lminf.errors import InputError
from lminf.evals import metrics, score
from lminf.experiments import _seeds
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.run import memory, plots
from lminf.run.folder import Row, RunFolder

FIRST, NUMBERS = 33, 94  # the printable characters, of which the first is 1; after 94 comes 1 again
ASKED = 10  # a line feed, between a request and its answer
(END,) = ByteTokenizer().eos_ids
PER_TOKEN, PER_SEQUENCE = WEIGHTS = ("per_token", "per_sequence")  # what weighs the same


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses weights that there are none of, numbers that there are no characters for, and answers
    that do not fit in a row.
    """
    for weights in c.loss_weights:
        if weights not in WEIGHTS:
            raise InputError(f"there are no loss weights {weights!r}; {closest(weights, WEIGHTS)}")
    highest = max(*c.longest, *c.requested)
    if highest > NUMBERS:
        raise InputError(
            f"--config.longest and --config.requested go up to {highest}, but there are {NUMBERS} "
            f"numbers; give none above it"
        )
    if max(c.longest) > c.tuning.length - 2:
        raise InputError(
            f"--config.longest={c.longest}: an answer of {max(c.longest)} characters with its "
            f"request and end does not fit; give --config.tuning.length>={max(c.longest) + 2}"
        )


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    memory.keep_pages()
    check(c)
    # A fine-tuning of which a row is missing is measured anew.
    counts = Counter(tuning_of(row) for row in out.rows())
    done = {each for each, n in counts.items() if n == c.replicates * len(c.requested)}
    missing = [each for each in itertools.product(c.loss_weights, c.longest) if each not in done]
    if not missing:
        return
    out.keep(lambda row: tuning_of(row) in done)
    texts = [Texts(c.length, c.batch, seed) for seed in _seeds.seeds(c)]
    start = _seeds.Training(c, c.schedule, c.steps).run(texts, label="texts")
    tuning = _seeds.Training(c, c.tuning.schedule, c.tuning.steps)
    for weights, longest in missing:
        answers = [Answers(c.tuning.length, c.batch, seed, longest, weights == PER_SEQUENCE)
                   for seed in _seeds.seeds(c)]  # fmt: skip
        label = f"answers up to {longest}, weights {weights}"
        models = tuning.run(answers, label=label, start=start)
        yield from [
            {"longest_trained": longest, "weights": weights, "seed": seed, **row}
            for seed, lm in zip(_seeds.seeds(c), models, strict=True) for row in written(c, lm)
        ]  # fmt: skip


def tuning_of(row: Row) -> tuple[str, int]:
    """(loss weights, longest answer) of the fine-tuning of a row; the first rows had one kind."""
    return row.get("weights", PER_TOKEN), row["longest_trained"]


# --- Data -----------------------------------------------------------------------------------------


class Texts(_seeds.DrawnRows):
    """Batches of texts that fill their row, counting on from a random number."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        starts = np.random.default_rng((self.seed, step)).integers(0, NUMBERS, (self.rows, 1))
        text = (FIRST + (starts + np.arange(self.length + 1)) % NUMBERS).astype(np.int32)
        ones = np.ones((self.rows, self.length), np.float32)
        return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": ones}


@dataclass(frozen=True)
class Answers(_seeds.DrawnRows):
    """Batches of requests with their answers of 1 to `longest` numbers, one of them a row.

    All characters of answers, and their ends, have weight 1, or of each answer weight 1 together;
    requests have none.
    """

    longest: int
    per_sequence: bool = False

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, step))
        tokens = np.zeros((self.rows, self.length + 1), np.int32)
        weights = np.zeros((self.rows, self.length), np.float32)
        for row, last in enumerate(random.integers(1, self.longest + 1, self.rows).tolist()):
            text = [FIRST + last - 1, ASKED, *range(FIRST, FIRST + last), END]
            tokens[row, : len(text)] = text
            of_tokens = np.zeros(self.length + 1, np.float32)
            of_tokens[2 : len(text)] = 1
            if self.per_sequence:
                (example,) = PerSequence()({"tokens": tokens[row], "weights": of_tokens}, ())
                of_tokens = example["weights"]
            weights[row] = of_tokens[1:]
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def written(c: ConfigDict, lm: LM) -> Iterator[Row]:
    """Of every number that is asked for: the characters written, greedily, and their score."""
    prompts = [np.array([FIRST + last - 1, ASKED], np.int32) for last in c.requested]
    texts = lm.generate(prompts, max_new_tokens=c.max_new_tokens)
    for last, text in zip(c.requested, texts, strict=True):
        yield {"requested": last, "written": len(text),
               "ended": len(text) < c.max_new_tokens,
               "score": metrics.length_score(len(text), last)}  # fmt: skip


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> Figure:
    rows = [{**row, "weights": tuning_of(row)[0]} for row in rows]
    by = ("weights", "longest_trained", "requested")
    means = _seeds.over_seeds(rows, by, "written")
    points = [
        {"trained": f"trained up to {longest}", "panel": f"loss weights {weights}",
         "requested": requested, "written": value.mean, **score.ends(value)}
        for (weights, longest, requested), value in means.items()
    ]  # fmt: skip
    return plots.curves(
        points, x="requested", y="written", by="trained", panel="panel", interval=("low", "high"),
        log_x=True, log_y=True, x_label="requested (characters)",
        y_label="written (characters, 95 % over seeds)",
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """By loss weights and the longest answer trained on: the longest output of a seed, and the
    scores of lengths that were trained on and of longer ones; and what per-sequence weights have
    above per-token ones with the same seed. Means over seeds with 95 % intervals.
    """
    by_model: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        by_model.setdefault((*tuning_of(row), row["seed"]), []).append(row)
    models = {
        (weights, trained, seed): {
            "weights": weights, "trained": trained,
            "longest output": max(row["written"] for row in group),
            **{name: float(np.mean([row["score"] for row in group
                                    if (row["requested"] <= trained) == inside]))
               for name, inside in (("score of trained lengths", True),
                                    ("score of longer ones", False))},
        }
        for (weights, trained, seed), group in by_model.items()
    }  # fmt: skip
    measures = ("longest output", "score of trained lengths", "score of longer ones")
    above = [
        {"weights": f"{PER_SEQUENCE} above {PER_TOKEN}", "trained": trained,
         **{name: model[name] - other[name] for name in measures}}
        for (weights, trained, seed), model in models.items() if weights == PER_SEQUENCE
        if (other := models.get((PER_TOKEN, trained, seed)))
    ]  # fmt: skip
    lines: dict[tuple[str, int], Row] = {}
    for name in measures:
        means = _seeds.over_seeds([*models.values(), *above], ("weights", "trained"), name)
        for (weights, trained), value in means.items():
            facts = {"loss weights": weights, "longest trained": trained}
            line = lines.setdefault((weights, trained), facts)
            line[name] = score.value_text(value, digits=1 if name == "longest output" else 2)
    return list(lines.values())


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("loss_weights",), check=check)
