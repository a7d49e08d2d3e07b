"""Facts among characters (_lookups), looked up in contexts that are reduced: by cutting them, in
the caches of a small model, and by what is trained beside it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.config import parse_choice
from lminf.experiments import _lookups, _seeds
from lminf.experiments._lookups import KEYS, MEASURED, VALUE, VALUES, Lookups
from lminf.lm.budget import Budget
from lminf.lm.lm import LM
from lminf.models.extensible import ExtensibleTokenizer, TwoStream
from lminf.models.longmem import LongMem, SideNetwork
from lminf.programs.compressed import Extensible, Memory
from lminf.programs.reduce import TextReducer, Truncation
from lminf.programs.trained_summary import Form, Pair, TrainedSummary, training_rows
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import frozen
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES

NOTHING = "nothing"  # is reduced
TRUNCATIONS = {cut.name: cut for cut in map(Truncation, ("end", "start", "middle"))}
LOOKUPS = (NOTHING, *TRUNCATIONS, TrainedSummary.name, Extensible.name, Memory.name)
# (contexts, the question of each, budget) -> log-probabilities of what follows
Answer: TypeAlias = Callable[[Sequence[str], Sequence[str], Budget], Float[np.ndarray, "N V"]]


def policies(texts: Sequence[str], size: int) -> list[Any]:
    """Policies that keep so many tokens: {c} is the budget, {w} the same less the sinks, {h} a
    quarter of it.
    """
    return [parse_policy(text.format(c=size, w=size - 4, h=size // 4)) for text in texts]


def label(name: str) -> str:
    """A policy by its kind: its sizes follow from the budget."""
    return name.partition(":")[0]


@dataclass(frozen=True)
class Lookup:
    """The part of the experiment whose models are trained here; `c` is its section of the config
    with the experiment's seed.
    """

    c: ConfigDict

    @cached_property
    def training(self) -> _seeds.Training:
        """Of the models that read short documents, before anything is trained beside them."""
        settings = ConfigDict({**self.c.to_dict(), "length": self.c.trained_length})
        return _seeds.Training(settings, self.c.schedule, self.c.steps)

    def rows(self, out: RunFolder) -> Iterator[Row]:
        """A row for each seed, method and budget. What is trained is trained anew for the rows of
        a seed that are missing.
        """
        c = self.c
        cells = [(name, size) for name in (*c.methods, *c.policies)
                 for size in ((c.length + 1,) if name == NOTHING else c.budgets)]  # fmt: skip
        done = {(row["seed"], row["method"], row["budget"]) for row in out.rows()
                if row["part"] == "lookups"}  # fmt: skip
        missing = {seed: [(name, size) for name, size in cells
                          if (seed, label(name), size) not in done]
                   for seed in _seeds.seeds(c)}  # fmt: skip
        if not any(missing.values()):
            return
        data = [Lookups(c.trained_length, c.batch, seed) for seed in missing]
        models = self.training.run(data, label="short documents")
        reducers: list[dict[str, TextReducer]] = [dict(TRUNCATIONS) for _ in missing]
        if any(TrainedSummary.name in dict(missing_cells) for missing_cells in missing.values()):
            for each, written in zip(reducers, self.summaries(models, [*missing]), strict=True):
                each[written.name] = written
        for (seed, missing_cells), lm, of_seed in zip(
            missing.items(), models, reducers, strict=True
        ):
            answers = {name: self.answer(name, lm, seed, of_seed) for name in dict(missing_cells)}
            for name, size in missing_cells:
                yield self.measured(label(name), answers[name], size, seed)

    def summaries(self, models: Sequence[LM], seeds: Sequence[int]) -> list[TrainedSummary]:
        """By each of the models, trained further to write them."""
        summary = self.c.summary
        lengths = tuple(summary.lengths)
        data = [SummaryRows(self.c.length, summary.batch, seed, lengths) for seed in seeds]
        settings = ConfigDict({**self.c.to_dict(), "length": data[0].width})
        training = _seeds.Training(settings, summary.schedule, summary.steps)
        trained = training.run(data, label="summaries", start=models)
        return [TrainedSummary(each, summary_form(lengths), lengths) for each in trained]

    def measured(self, name: str, answer: Answer, size: int, seed: int) -> Row:
        """The share of questions whose value is the likeliest of all, and by how many nats it is
        likelier than the others on average.
        """
        c, started = self.c, time.perf_counter()
        key = (c.seed, MEASURED, c.length)
        prompts, values = _lookups.questions(key, c.instances, short=KEYS, long=c.length + 1)
        log_probs = answer(
            [each.long[:-1] for each in prompts], [each.long[-1] for each in prompts],
            Budget(size, str.encode, "characters"),
        )[:, VALUE : VALUE + VALUES].astype(np.float64)  # fmt: skip
        right = np.array([ord(value) - VALUE for value in values])
        chosen = log_probs[np.arange(len(right)), right]
        return {
            "part": "lookups", "model": "trained here", "method": name, "budget": size,
            "seed": seed, "length": c.length, "instances": len(right),
            "score": float((log_probs.argmax(1) == right).mean()),
            "margin": float((chosen - (log_probs.sum(1) - chosen) / (VALUES - 1)).mean()),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip

    # --- Methods ----------------------------------------------------------------------------------

    def answer(self, name: str, lm: LM, seed: int, reducers: Mapping[str, TextReducer]) -> Answer:
        """How the method answers, once what it needs is trained."""
        if name == Extensible.name:
            return self.extensible(lm, seed)
        if name == Memory.name:
            return self.longmem(lm, seed)

        def following(
            contexts: Sequence[str], questions: Sequence[str], budget: Budget
        ) -> np.ndarray:
            pairs, model = list(zip(contexts, questions, strict=True)), lm
            if reducer := reducers.get(name):
                pairs = [
                    (reducer.reduce(text, question, budget), question) for text, question in pairs
                ]
            elif name != NOTHING:
                model = lm.with_policy(policies([name], budget.size)[0])
            return model.next(["".join(pair) for pair in pairs])

        return following

    def extensible(self, lm: LM, seed: int) -> Answer:
        """The ratio is drawn for each step: it is a size, for which a program is compiled."""
        c = self.c
        tokenizer = ExtensibleTokenizer(lm.spec, layers=c.layers, chunk=c.chunk)
        ratios = np.random.default_rng((seed, 1)).choice(c.ratios, c.tuning.steps)
        params = self.trained(
            lm, lambda step: TwoStream(tokenizer, int(ratios[step])), tokenizer.init(lm.params),
            seed, Extensible.name,
        )  # fmt: skip
        made = Extensible(lm, tokenizer, params, c.ratios)
        return one_by_one(
            lambda text, question, budget: made.next(made.reduce(text, question, budget), question)
        )

    def longmem(self, lm: LM, seed: int) -> Answer:
        """A side network for each budget, which is what it retrieves."""
        c = self.c

        def following(
            contexts: Sequence[str], questions: Sequence[str], budget: Budget
        ) -> np.ndarray:
            retrieved = (budget.size - 1) // c.retrieved_together * c.retrieved_together
            longmem = LongMem(
                lm.spec, memory_layer=lm.spec.num_layers - 1, capacity=c.length,
                retrieved=retrieved, chunk=c.retrieved_together,
            )  # fmt: skip
            side = self.trained(
                lm, lambda step: SideNetwork(longmem, c.chunk), longmem.init(lm.params), seed,
                f"{Memory.name}, {retrieved} retrieved",
            )  # fmt: skip
            made = Memory(lm, longmem, side, c.chunk)
            return one_by_one(
                lambda text, question, budget: made.next(
                    made.reduce(text, question, budget), question
                )
            )(contexts, questions, budget)

        return following

    def trained(
        self, lm: LM, loss_at: Callable[[int], frozen.Loss], params: Any, seed: int, label: str
    ) -> Any:
        """What is trained beside the model: on contexts in chunks, and a chunk of questions."""
        c = self.c
        texts = LookupTexts(c.length, c.chunk, c.tuning.batch, seed)
        with Progress(c.tuning.steps, label=f"seed {seed}, {label}") as progress:
            params, _ = frozen.fit(
                loss_at, params, lm.params, texts.batch,
                optimizer=parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
                schedule=parse_choice(c.tuning.schedule, SCHEDULES, what="schedule"),
                steps=c.tuning.steps, progress=progress.update,
            )  # fmt: skip
        return jax.device_get(params)


def one_by_one(answer: Callable[[str, str, Budget], Float[np.ndarray, " V"]]) -> Answer:
    """The answers to many questions of what answers one."""

    def following(contexts: Sequence[str], questions: Sequence[str], budget: Budget) -> np.ndarray:
        pairs = zip(contexts, questions, strict=True)
        return np.stack([answer(text, question, budget) for text, question in pairs])

    return following


def summary_form(lengths: Sequence[int]) -> Form:
    """A summary of each length is asked for by a character of its own."""
    return Form(lambda length: chr(_lookups.ASK + lengths.index(length)), chr(_lookups.END))


@dataclass(frozen=True)
class SummaryRows(_seeds.DrawnRows):
    """Batches of contexts, each with its summary of one of the lengths: the facts of the first so
    many keys in their order, which are all that is ever asked for.
    """

    lengths: tuple[int, ...]  # characters

    @property
    def width(self) -> int:
        """Tokens of a row: a context, what asks, and the longest summary."""
        return self.length + 1 + min(max(self.lengths), KEYS)

    def pairs(self, step: int) -> list[Pair]:
        random = np.random.default_rng((self.seed, _lookups.TRAINING, 2, step))
        content, values, _ = _lookups.documents(random, self.rows, self.length)
        facts = _lookups.FACT + VALUES * np.arange(KEYS) + values
        lengths = random.choice(self.lengths, self.rows).tolist()
        return [
            Pair(bytes(text).decode(), length, bytes(kept[:length]).decode())
            for text, length, kept in zip(content.tolist(), lengths, facts.tolist(), strict=True)
        ]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        def encode(text: str) -> np.ndarray:  # as the models read it, which have a token a byte
            return np.frombuffer(text.encode(), np.uint8)

        form = summary_form(self.lengths)
        return training_rows(self.pairs(step), form, encode, width=self.width)


@dataclass(frozen=True)
class LookupTexts:
    """Batches of contexts, each before a chunk of questions and their answers, which count."""

    length: int
    chunk: int
    rows: int
    seed: int

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, _lookups.TRAINING, 1, step))
        content, values, _ = _lookups.documents(random, self.rows, self.length)
        keys = random.integers(0, KEYS, (self.rows, self.chunk // 2))
        answers = VALUE + np.take_along_axis(values, keys, axis=1)
        queries = np.stack([_lookups.KEY + keys, answers], axis=2).reshape(self.rows, -1)
        weights = np.zeros((self.rows, self.length + self.chunk), np.float32)
        weights[:, self.length + 1 :: 2] = 1
        tokens = np.concatenate([content, queries], axis=1).astype(np.int32)
        return {"tokens": tokens, "weights": weights}
