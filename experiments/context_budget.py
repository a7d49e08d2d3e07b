"""What of a long context is kept at equal budget, by method: answers of two kinds of lookup.

prose     one of several numbers that stand in prose, asked of a model that is not trained further;
          texts are reduced before it reads them, policies reduce its keys and values
lookups   one of eight facts among characters (_lookups), asked of small models that are trained
          here, and of what is trained beside them: summaries, Extensible Tokenization and LongMem

A budget is of the context and the question together, in tokens: of a text, of embeddings, or of the
keys and values that a token attends to.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest
from lminf.errors import InputError
from lminf.evals import score
from lminf.evals.runner import Subject
from lminf.evals.suites.ruler import MultiKey
from lminf.experiments import _evals, _models, _seeds
from lminf.experiments._lookup_budget import LOOKUPS, NOTHING, TRUNCATIONS, Lookup, policies
from lminf.experiments._main import main
from lminf.lm.budget import Budget
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.models.extensible import first_layer_params, first_layers
from lminf.programs.reduce import BM25, Reader, TextReducer
from lminf.programs.reduce_by_model import EMBEDDED, Segments, SemanticDeletion, Summary
from lminf.programs.scm import SCM
from lminf.programs.trained_summary import TrainedSummary
from lminf.run import memory, plots
from lminf.run.folder import Row, RunFolder

PROSE = (*TRUNCATIONS, BM25.name, SemanticDeletion.name, Segments.name, SCM.name, Summary.name)
PANELS = {"prose": "a number in prose", "lookups": "a fact among characters"}


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses methods that there are none of, and sizes that do not divide."""
    for methods, known in ((c.methods, PROSE), (c.lookups.methods, LOOKUPS)):
        for method in methods:
            if method not in known:
                raise InputError(f"there is no method {method!r}; {closest(method, known)}")
    if c.lookups.length % c.lookups.chunk:
        raise InputError(
            f"--config.lookups.length={c.lookups.length}: contexts are read in chunks of "
            f"{c.lookups.chunk}; give a multiple"
        )


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    memory.keep_pages()
    check(c)
    yield from Lookup(ConfigDict({**c.lookups.to_dict(), "seed": c.seed})).rows(out)
    yield from prose(c, out)


# --- Numbers in prose -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembering:
    """A LanguageModel that embeds by the first layers, and every text once: the questions about a
    context share it. Texts are embedded in batches of one size, for which alone is compiled.
    """

    model: SharedPrefix
    embedder: LM
    _known: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.model, verb)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            filled = new + new[-1:] * (-len(new) % EMBEDDED)
            self._known.update(zip(new, self.embedder.embed(filled), strict=False))
        return np.stack([self._known[text] for text in texts])


def prose(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    """A row for each method and budget."""
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
    layers = min(c.embedding_layers, lm.spec.num_layers)
    shape, params = first_layers(lm.spec, layers), first_layer_params(lm.params, layers)
    shared = SharedPrefix(lm)
    model: Any = Remembering(shared, LM(shape, params, lm.tokenizer, dtype=lm.dtype))
    methods: dict[str, TextReducer] = {
        **TRUNCATIONS,
        BM25.name: BM25(words=c.words),
        SemanticDeletion.name: SemanticDeletion(model, span=c.span, rounds=c.rounds),
        Segments.name: Segments(lm, segment_len=c.segment_len),
        SCM.name: SCM(model, recalled=c.recalled, turn_words=c.words, ask_first=False),
        Summary.name: Summary(shared),
    }  # fmt: skip
    task = MultiKey(keys=c.needles, questions=c.needles)
    subjects = [Subject(shared, columns(c, NOTHING, c.length))]
    for size in c.budgets:
        budget = Budget(size, lambda text: lm.encode(text)[0], f"tokens of {c.model}")
        subjects += [
            Subject(Reader(shared, methods[name], budget, split), columns(c, name, size))
            for name in c.methods
        ]
        for policy in policies(c.policies, size):
            name = policy.name.partition(":")[0]
            subjects.append(
                Subject(SharedPrefix(lm.with_policy(policy)), columns(c, name, size))
            )  # fmt: skip
    yield from _evals.measure(
        c, out, lm, subjects, _evals.cells([task], [c.length], [c.instances])
    )  # fmt: skip


def columns(c: ConfigDict, method: str, budget: int) -> dict[str, Any]:
    return {"part": "prose", "model": c.model, "method": method, "budget": budget}


def split(prompt: str) -> tuple[str, str]:
    """The context, and the question on the last line."""
    context, line, question = prompt.rpartition("\n")
    return context, line + question


# --- What is shown --------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> list[Row]:
    """A method of a part, and its budget, a line, with intervals: over questions of one model, and
    over seeds."""
    lines = [
        {"part": "prose", "method": row["method"], "budget": row["budget"],
         "answered": score.Interval(row["score"], row["low"], row["high"]), "margin": None,
         "questions": row["instances"]}
        for row in rows if row["part"] == "prose"
    ]  # fmt: skip
    lookups = [row for row in rows if row["part"] == "lookups"]
    means, margins = (_seeds.over_seeds(lookups, ("method", "budget"), name)
                      for name in ("score", "margin"))  # fmt: skip
    lines += [
        {"part": "lookups", "method": method, "budget": budget, "answered": interval,
         "margin": margins[method, budget],
         "questions": sum(row["instances"] for row in lookups
                          if (row["method"], row["budget"]) == (method, budget))}
        for (method, budget), interval in means.items()
    ]  # fmt: skip
    return sorted(lines, key=lambda line: (line["part"] == "lookups", -line["budget"]))


def table(rows: list[Row]) -> list[Row]:
    return [
        {"asked for": PANELS[line["part"]],
         "budget": line["budget"], "method": line["method"], "questions": line["questions"],
         "answered": score.value_text(line["answered"]),
         "margin (nats)": line["margin"] and score.value_text(line["margin"])}
        for line in summary(rows)
    ]  # fmt: skip


def kind(method: str) -> str:
    """Which methods stand in one panel."""
    if method in (NOTHING, *TRUNCATIONS):
        return "cut"
    return "chosen texts" if method in (*PROSE, TrainedSummary.name) else "inside the model"


def plot(rows: list[Row]) -> Figure:
    """Answers by budget; what is reduced by nothing has the whole length."""
    points = [
        {**line, "answered": line["answered"].mean, **score.ends(line["answered"]),
         "panel": f"{PANELS[line['part']]}: {kind(line['method'])}"}
        for line in summary(rows)
    ]  # fmt: skip
    return plots.curves(
        points, x="budget", y="answered", by="method", panel="panel", interval=("low", "high"),
        log_x=True, y_limits=(-0.04, 1.04), x_label="budget (tokens of context and question)",
        y_label="questions answered (share, 95 %)",
    )  # fmt: skip


if __name__ == "__main__":
    main(
        run, plot, table=table, resumes=True, check=check, may_change=("methods", "lookups.methods")
    )
