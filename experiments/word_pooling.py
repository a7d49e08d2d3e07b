"""Trains models that read words whole or as units, on the same rows of words, and asks each for the
next word.

A word is right when all its units are the likeliest after the right ones before them, and so is
what ends it: the likeliest next unit, again and again, then writes exactly that word. Its nats are
the sum over those units, so they compare models of different units (of subwords they are those of
one way to spell the word, which is an upper bound).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.policy import FULL
from lminf.config import closest, parse_choice
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _seeds, _texts, _words
from lminf.experiments._main import main
from lminf.experiments._words import Units, Words
from lminf.models import decoder, heads, spec
from lminf.models.spec import ModelSpec
from lminf.models.word_pooling import NextWords, WordPooling
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import frozen
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.types import Params

POOLED, BASE = "word pooling", "subword"
UNITS = {POOLED: "character", BASE: "subword", "byte": "byte", "character": "character"}
ALL = "all words"


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses models that do not exist, before the others are trained."""
    for name in c.models:
        if name not in UNITS:
            raise InputError(f"no model is called {name!r}; {closest(name, UNITS)}")
    if c.words < 2:
        raise InputError(f"--config.words={c.words}: a row needs a word and the next; give 2")


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    done = {(row["model"], row["seed"]) for row in out.rows() if row["words"] == ALL}
    out.keep(lambda row: (row["model"], row["seed"]) in done)
    text = "\n".join(_texts.pages(c.text))
    words = _words.rows_of(text, words=c.words, longest=c.longest, held_out=c.held_out)
    for name in c.models:
        seeds = [seed for seed in _seeds.seeds(c) if (name, seed) not in done]
        if not seeds:
            continue
        model = model_of(c, name, words)
        # Built once: a step is compiled for the very optimizer it is given.
        optimizer = parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build()
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(words.train)
            read = words.rows[order[np.arange(c.steps * c.batch) % words.train]]
            params, losses = trained(c, model, read, optimizer, seed, label=f"{name}, seed {seed}")
            facts = {
                "model": name, "seed": seed, "text": sources.digest(text), "steps": c.steps,
                "parameters": parameters(params), "positions": model.positions(words.rows),
                "loss": float(losses[-max(1, c.steps // 20) :].mean()),
            }  # fmt: skip
            for of_bucket in measured(c, model, params, words, read):
                yield {**facts, **of_bucket}


def trained(
    c: ConfigDict,
    model: "Model",
    read: Int[np.ndarray, "N W"],
    optimizer: Any,
    seed: int,
    *,
    label: str,
) -> tuple[Params, Float[np.ndarray, " steps"]]:
    """The model after it has read these rows, and the loss of each step."""
    loss = model.loss
    with Progress(c.steps, label=label) as progress:
        return frozen.fit(
            lambda step: loss, model.init(jax.random.key(seed)), {},
            lambda step: model.batch(read[step * c.batch :][: c.batch]),
            optimizer=optimizer, schedule=parse_choice(c.schedule, SCHEDULES, what="schedule"),
            steps=c.steps, progress=progress.update,
        )  # fmt: skip


def measured(
    c: ConfigDict, model: "Model", params: Params, words: Words, read: Int[np.ndarray, "N W"]
) -> Iterator[Row]:
    """Of the words in the second half of held-out rows: by how often the model has read them."""
    rows = words.rows[words.train :][: c.contexts]
    rows = rows[: len(rows) // c.batch * c.batch]
    if not len(rows):
        raise InputError(
            f"the text has fewer than {c.batch} held-out rows; give a larger --config.held_out"
        )
    batches = rows.reshape(-1, c.batch, rows.shape[1])
    judged = [model.judge(params, model.batch(batch)) for batch in batches]
    right, nats = (np.concatenate(each) for each in zip(*judged, strict=True))
    asked, right, nats = (x[:, words.rows.shape[1] // 2 :] for x in (rows, right, nats))
    times = np.bincount(read.ravel(), minlength=len(words.types))[asked]
    number = np.array([word.isdecimal() for word in words.types])[asked]
    buckets = {
        "never": times == 0, "1-9 times": (times >= 1) & (times < 10),
        "10-99 times": (times >= 10) & (times < 100), "100 times or more": times >= 100,
        "numbers": number, ALL: times >= 0,
    }  # fmt: skip
    for name, inside in buckets.items():
        if inside.any():
            yield {"words": name, "n": int(inside.sum()), "nats": float(nats[inside].mean()),
                   "accuracy": float(right[inside].mean())}  # fmt: skip


def parameters(params: Params) -> int:
    """Beside the table of units, which differ in number."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if path[-1].key not in ("embed", "head"))


# --- Models ---------------------------------------------------------------------------------------


Judged: TypeAlias = tuple[Bool[np.ndarray, "B W"], Float[np.ndarray, "B W"]]


class Model(Protocol):
    """A model of words, in units of its own."""

    loss: Any  # frozen.Loss

    def init(self, key: jax.Array) -> Params: ...

    def batch(self, rows: Int[np.ndarray, "B W"]) -> dict[str, np.ndarray]: ...

    def judge(self, params: Params, batch: Mapping[str, Any]) -> Judged:
        """Whether each word is what the model expects after those before it, and nats of its units;
        of the first, False and 0.
        """
        ...

    def positions(self, rows: Int[np.ndarray, "N W"]) -> float:
        """Of a word, in the model that reads a row."""
        ...


def model_of(c: ConfigDict, name: str, words: Words) -> Model:
    units = _words.in_units(UNITS[name], words, vocab=c.vocab)
    inside = c.encoder_layers + c.decoder_layers
    sizes = {**c.model.to_dict()}
    if name == POOLED:
        shape = spec.llama(vocab_size=units.size, trained_length=c.words, **sizes)
        pooling = WordPooling(shape, c.slots, c.encoder_layers, c.decoder_layers, _words.STOP)
        return Pooled(pooling, units)
    longest = int(units.lengths(words.rows).max())
    sizes["num_layers"] += inside
    return Flat(spec.llama(vocab_size=units.size, trained_length=longest, **sizes), units, longest)


def judged(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Bool[Array, "*B"], Float[Array, "*B"]]:
    """Whether each target is the likeliest, and its nats."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return logits.argmax(-1) == targets, -chosen


@dataclass(frozen=True, eq=False)
class Pooled:
    pooling: WordPooling
    units: Units

    @property
    def loss(self) -> NextWords:
        return NextWords(self.pooling)

    def init(self, key: jax.Array) -> Params:
        return self.pooling.init(key=key)

    def batch(self, rows: Int[np.ndarray, "B W"]) -> dict[str, np.ndarray]:
        return {"words": self.units.within[rows], "known": self.units.known[rows]}

    def judge(self, params: Params, batch: Mapping[str, Any]) -> Judged:
        correct, nats = (np.asarray(x) for x in self._judge(params, batch["words"]))
        first = ((0, 0), (1, 0))
        return np.pad(correct.all(-1), first) & batch["known"], np.pad(nats.sum(-1), first)

    @cached_property
    def _judge(self):
        def judge(params, words):
            logits, targets = self.pooling.next_words(params, words)
            best, nats = judged(logits, jnp.maximum(targets, 0))
            padding = targets < 0
            return best | padding, jnp.where(padding, 0, nats)

        return jax.jit(judge)

    def positions(self, rows: Int[np.ndarray, "N W"]) -> float:
        return float(self.pooling.slots)


@dataclass(frozen=True)
class NextUnits:
    """Mean nats of the units of a batch: the loss of an ordinary decoder."""

    shape: ModelSpec

    def logits(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        module = decoder.Decoder(self.shape, (FULL,) * self.shape.num_layers)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        applied: Any = module.apply({"params": params}, tokens, positions=positions)
        return heads.lm(self.shape, params, applied[0])

    def __call__(self, params: Params, frozen: Params, batch: Mapping[str, Array]) -> Array:
        log_probs = jax.nn.log_softmax(self.logits(params, batch["tokens"]))
        chosen = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        present = batch["word"] >= 0
        return -jnp.where(present, chosen, 0).sum() / present.sum()


@dataclass(frozen=True, eq=False)
class Flat:
    """An ordinary decoder over the units of a row's words, one after another."""

    shape: ModelSpec
    units: Units
    longest: int  # units of a row

    @property
    def loss(self) -> NextUnits:
        return NextUnits(self.shape)

    def init(self, key: jax.Array) -> Params:
        return decoder.init(self.shape, key=key)

    def batch(self, rows: Int[np.ndarray, "B W"]) -> dict[str, np.ndarray]:
        """`word` is the word of a row that a target belongs to, -1 of padding."""
        units = np.zeros((len(rows), self.longest), np.int32)
        word = np.full(units.shape, -1, np.int32)
        for row, (own_units, own_word) in zip(rows, zip(units, word, strict=True), strict=True):
            spelled = self.units.spelled[row]
            place, _ = np.nonzero(spelled >= 0)
            own_units[: len(place)], own_word[: len(place)] = spelled[spelled >= 0], place
        batch = {"tokens": units[:, :-1], "targets": units[:, 1:], "word": word[:, 1:]}
        return {**batch, "known": self.units.known[rows]}

    def judge(self, params: Params, batch: Mapping[str, Any]) -> Judged:
        correct, nats = (np.asarray(x) for x in self._judge(params, batch))
        right, of_words = batch["known"].copy(), np.zeros(batch["known"].shape)
        later = batch["word"] > 0
        row, place = np.nonzero(later & ~correct)
        right[row, batch["word"][row, place]] = False
        np.add.at(of_words, (np.nonzero(later)[0], batch["word"][later]), nats[later])
        right[:, 0] = False
        return right, of_words

    @cached_property
    def _judge(self):
        def judge(params, batch):
            return judged(self.loss.logits(params, batch["tokens"]), batch["targets"])

        return jax.jit(judge)

    def positions(self, rows: Int[np.ndarray, "N W"]) -> float:
        return float(self.units.lengths(rows).sum() / rows.size)


# --- Showing --------------------------------------------------------------------------------------


MEASURES = {"accuracy": ("right (%)", 100, 1), "nats": ("nats a word", 1, 2)}


def table(rows: list[Row]) -> list[Row]:
    """Two lines a model: the share of words that are right and their nats, means over seeds with
    95 % intervals (Student's t), by how often a word was read in training; the last column is
    paired by seed.
    """
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    lines = []
    for measure, (label, factor, digits) in MEASURES.items():
        base = {row["seed"]: row[measure] for row in rows
                if (row["model"], row["words"]) == (BASE, ALL)}  # fmt: skip
        for name, own in by_model.items():
            line: Row = {
                "measure": label, "model": name, "seeds": len({row["seed"] for row in own}),
                "parameters": own[0]["parameters"],
                "positions a word": f"{own[0]['positions']:.2f}",
            }  # fmt: skip
            values: dict[str, list[float]] = {}
            for row in own:
                values.setdefault(row["words"], []).append(row[measure])
            if name != BASE and base:
                values[f"{ALL}, above {BASE}"] = [
                    row[measure] - base[row["seed"]] for row in own
                    if row["words"] == ALL and row["seed"] in base
                ]  # fmt: skip
            for bucket, of_seeds in values.items():
                interval = _seeds.interval([factor * value for value in of_seeds])
                line[bucket] = score.value_text(interval, digits=digits)
            lines.append(line)
    return lines


def plot(rows: Sequence[Row]) -> dict[str, Figure]:
    labels = {
        "accuracy": "next words that are right, each seed a dot (%)",
        "nats": "loss of next words, each seed a dot (nats/word)",
    }
    return {
        f"word_pooling_{measure}": plots.bars(
            [{**row, measure: factor * row[measure]} for row in rows],
            x="words", y=measure, by="model", center=np.mean, x_label="how often a word was read",
            y_label=labels[measure],
        )
        for measure, (_, factor, _) in MEASURES.items()
    }  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check, may_change=("models", "replicates"))
