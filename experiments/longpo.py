"""What a small model that is good at short prompts learns about long ones from its own answers.

Documents and questions are those of _lookups.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest
from lminf.data import pairs
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _seeds
from lminf.experiments._lookups import KEYS, MEASURED, TRAINING, Lookups, questions
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.objectives.distill import sft_with_kl
from lminf.objectives.preference import DPO, longpo
from lminf.objectives.terms import CrossEntropy, Term
from lminf.programs.longpo import AnswerPair, Prompts, rounds
from lminf.run import folder, memory, plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train.loop import fit
from lminf.train.step import TrainStep

METHODS = ("none", "sft", "sft_kl", "dpo", "longpo")


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses methods that there are none of, and documents without room for their facts."""
    for method in c.methods:
        if method not in METHODS:
            raise InputError(f"there is no method {method!r}; {closest(method, METHODS)}")
    least = KEYS + 4
    if min(c.length, *c.lengths) < least:
        raise InputError(
            f"prompts of {min(c.length, *c.lengths)} characters do not hold {KEYS} facts and a few "
            f"others; give at least {least} for --config.length and --config.lengths"
        )
    if min(c.tuning.lengths) <= c.length:
        raise InputError(
            f"--config.tuning.lengths={c.tuning.lengths}: long prompts are longer than the short "
            f"ones of --config.length={c.length}"
        )


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    memory.keep_pages()
    check(c)
    # A model of which a row is missing is measured anew.
    counts = Counter((row["method"], row["seed"]) for row in out.rows())
    done = {model for model, count in counts.items() if count == len(c.lengths)}
    out.keep(lambda row: (row["method"], row["seed"]) in done)
    missing = [(method, seed) for seed in _seeds.seeds(c) for method in c.methods
               if (method, seed) not in done]  # fmt: skip
    if not missing:
        return
    data = [Lookups(c.length, c.batch, seed) for seed in _seeds.seeds(c)]
    models = _seeds.Training(c, c.schedule, c.steps).run(data, label="short prompts")
    base = dict(zip(_seeds.seeds(c), models, strict=True))
    trainings = {method: Training(c, method) for method in c.methods}
    for method, seed in missing:
        lm = trainings[method].learned(base[seed], out, seed)
        for length in c.lengths:
            yield {"method": method, "seed": seed, "length": length, **measured(c, lm, length)}


def measured(c: ConfigDict, lm: LM, length: int) -> Row:
    """The share of questions answered after prompts of this length, and nats of right answers."""
    seeds = c.seed, MEASURED, length
    prompts, answers = questions(seeds, c.instances, short=KEYS, long=length)
    long, batch = [each.long for each in prompts], c.tuning.batch
    log_probs = np.concatenate([lm.next(long[i : i + batch]) for i in range(0, len(long), batch)])
    right = np.array([ord(answer) for answer in answers])
    correct = int((log_probs.argmax(1) == right).sum())
    nats = -log_probs[np.arange(len(right)), right].mean(dtype=np.float64)
    return {"instances": len(right), "score": correct / len(right), "nats": float(nats)}


# --- Methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Rounds of one method."""

    c: ConfigDict
    method: str

    @cached_property
    def objective(self) -> tuple[Term, ...]:
        return {
            "sft": (CrossEntropy(prefix="chosen_"),),
            "sft_kl": sft_with_kl(scale=self.c.preference_scale),
            "dpo": (DPO(self.c.beta),),
            "longpo": longpo(beta=self.c.beta, scale=self.c.preference_scale),
        }[self.method]

    @cached_property
    def step(self) -> TrainStep:
        tuning = self.c.tuning
        return _seeds.program(
            self.c, schedule=tuning.schedule, steps=tuning.steps, objective=self.objective
        )

    def learned(self, lm: LM, out: RunFolder, seed: int) -> LM:
        """The model after all rounds, whose answers are kept in the run's folder."""
        if self.method == "none":
            return lm
        path, tuning = out / "answers.jsonl", self.c.tuning

        def prompts_of(_, length: int) -> list[Prompts]:
            seeds = seed, TRAINING, length
            return questions(seeds, tuning.prompts, short=self.c.length, long=length)[0]

        *_, lm = rounds(
            lm, tuning.lengths, prompts_of=prompts_of, train=partial(self.train, seed),
            max_new_tokens=1, batch=tuning.batch, name=f"{self.method}, seed {seed}",
            rows=folder.read_lines(path), record=partial(folder.append_line, path),
        )  # fmt: skip
        return lm

    def train(self, seed: int, lm: LM, answers: Sequence[AnswerPair], index: int) -> LM:
        tuning = self.c.tuning
        # Half a character is no token of the answer that is meant.
        made = [pair.tokens(lm.tokenizer.encode) for pair in answers if pair.rejected.isascii()]
        if not made:
            return lm
        sizes = {"length": tuning.lengths[index], "reference_length": self.c.length}

        def batch(step: int):
            random = np.random.default_rng((seed, TRAINING, index, step))
            chosen = random.integers(0, len(made), tuning.batch)
            arrays = pairs.batch([made[i] for i in chosen], **sizes)
            return {name: jax.numpy.asarray(array) for name, array in arrays.items()}

        label = f"{self.method}, seed {seed}, prompts of {tuning.lengths[index]}"
        with Progress(tuning.steps, label=label) as progress:
            state = fit(
                self.step.step, self.step.start(lm.params), batch, steps=tuning.steps,
                watch=lambda done, metrics: progress.update(done, loss=float(metrics.loss)),
            )  # fmt: skip
        return _seeds.language_model(self.c, jax.device_get(state.params))


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> Figure:
    means = _seeds.over_seeds(rows, ("method", "length"), "score")
    points = [{"method": method, "length": length, "score": value.mean, **score.ends(value)}
              for (method, length), value in means.items()]  # fmt: skip
    return plots.curves(
        points, x="length", y="score", by="method", interval=("low", "high"), log_x=True,
        x_label="prompt (tokens)", y_label="questions answered (share, 95 % over seeds)",
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Questions answered and nats of right answers by method and length, and what LongPO has above
    each other method with the same seed; means over seeds with 95 % intervals.
    """
    lines: dict[str, Row] = {}
    for column in ("score", "nats"):
        of_longpo = {(row["length"], row["seed"]): row[column] for row in rows
                if row["method"] == "longpo"}  # fmt: skip
        above = [
            {**row, "method": f"longpo above {row['method']}", column: of_longpo[key] - row[column]}
            for row in rows
            if row["method"] != "longpo" and (key := (row["length"], row["seed"])) in of_longpo
        ]
        for (method, length), value in _seeds.over_seeds(
            [*rows, *above], ("method", "length"), column
        ).items():
            name = f"{method}, {column}"
            lines.setdefault(name, {"method": name})[str(length)] = score.value_text(value)
    return list(lines.values())


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("methods",), check=check)
