"""How long a small model writes, by the longest output that it was fine-tuned on.

Numbers are single characters. A request is a number; the answer counts up to it and ends. Before it
is fine-tuned a model is trained on texts that count on without an end, so it can write more than
the longest answer that it will see.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.data.tokenizers import ByteTokenizer
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


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses numbers that there are no characters for, and answers that do not fit in a row."""
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
    counts = Counter(row["longest_trained"] for row in out.rows())
    done = {longest for longest, n in counts.items() if n == c.replicates * len(c.requested)}
    if done >= set(c.longest):
        return
    out.keep(lambda row: row["longest_trained"] in done)
    texts = [Texts(c.length, c.batch, seed) for seed in _seeds.seeds(c)]
    start = _seeds.Training(c, c.schedule, c.steps).run(texts, label="texts")
    tuning = _seeds.Training(c, c.tuning.schedule, c.tuning.steps)
    for longest in c.longest:
        if longest in done:
            continue
        answers = [Answers(c.tuning.length, c.batch, seed, longest) for seed in _seeds.seeds(c)]
        models = tuning.run(answers, label=f"answers up to {longest}", start=start)
        yield from [
            {"longest_trained": longest, "seed": seed, **row}
            for seed, lm in zip(_seeds.seeds(c), models, strict=True) for row in written(c, lm)
        ]  # fmt: skip


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

    All characters of answers, and their ends, have weight 1; requests have none.
    """

    longest: int

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, step))
        tokens = np.zeros((self.rows, self.length + 1), np.int32)
        weights = np.zeros((self.rows, self.length), np.float32)
        for row, last in enumerate(random.integers(1, self.longest + 1, self.rows).tolist()):
            text = [FIRST + last - 1, ASKED, *range(FIRST, FIRST + last), END]
            tokens[row, : len(text)] = text
            weights[row, 1 : len(text) - 1] = 1
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
    means = _seeds.over_seeds(rows, ("longest_trained", "requested"), "written")
    points = [
        {"trained": f"trained up to {longest}", "requested": requested, "written": value.mean,
         **score.ends(value)}
        for (longest, requested), value in means.items()
    ]  # fmt: skip
    return plots.curves(
        points, x="requested", y="written", by="trained", interval=("low", "high"), log_x=True,
        log_y=True, x_label="requested (characters)",
        y_label="written (characters, 95 % over seeds)",
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """By the longest answer trained on: the longest output of a seed, and the scores of lengths
    that were trained on and of longer ones; means over seeds with 95 % intervals.
    """
    by_model: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_model.setdefault((row["longest_trained"], row["seed"]), []).append(row)
    models = [
        {
            "trained": trained,
            "longest output": max(row["written"] for row in group),
            **{name: float(np.mean([row["score"] for row in group
                                    if (row["requested"] <= trained) == inside]))
               for name, inside in (("score of trained lengths", True),
                                    ("score of longer ones", False))},
        }
        for (trained, _), group in by_model.items()
    ]  # fmt: skip
    lines: dict[int, Row] = {}
    for name in ("longest output", "score of trained lengths", "score of longer ones"):
        for (trained,), value in _seeds.over_seeds(models, ("trained",), name).items():
            line = lines.setdefault(trained, {"longest trained": trained})
            line[name] = score.value_text(value, digits=1 if name == "longest output" else 2)
    return list(lines.values())


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
