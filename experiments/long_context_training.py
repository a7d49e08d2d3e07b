"""Continues a model on long documents with its rotary base raised, and reads others by position.

    none             the model as it is
    lm_infinite      the same weights under LM-Infinite: no training
    raised           the same weights with the raised base: no training
    lora, finetuned  that, trained: adapters, or all parameters

Every version but lm_infinite attends in full. Documents that are read were in no step, and all
versions read the same ones: a claim is a difference with its interval over documents.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import FULL
from lminf.checkpoints import native
from lminf.config import closest, parse_choice
from lminf.errors import InputError
from lminf.evals import perplexity, score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.experiments._training import DTYPES, known
from lminf.lm.lm import LM
from lminf.models import layer_policies
from lminf.parallel import mesh, partition
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.surgery.lora import LoRA
from lminf.train import batches
from lminf.train.loop import Hook, fit
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.stages import Stage, Stages
from lminf.train.step import REMAT, Metrics, TrainStep

NONE, LM_INFINITE, RAISED = "none", "lm_infinite", "raised"
LORA, FINETUNED = "lora", "finetuned"
TRAINED = (LORA, FINETUNED)
VERSIONS = (NONE, LM_INFINITE, RAISED, *TRAINED)
BASES = (NONE, LM_INFINITE)  # what the others are compared with


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses versions that do not exist, and settings that training would refuse later."""
    for name in c.versions:
        if name not in VERSIONS:
            raise InputError(f"no version is called {name!r}; {closest(name, VERSIONS)}")
    parse_policy(c.policy)
    for name in TRAINED:
        Stages((stage_of(c, name),))


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    def cell(row: Row) -> tuple[str, int]:
        return row["version"], row["document"]

    blocks = math.ceil(c.length / c.block)
    counts = Counter(map(cell, out.rows()))
    done = {key for key, count in counts.items() if count == blocks}
    out.keep(lambda row: cell(row) in done)  # not what an interrupted call left
    missing = [(name, document) for document in range(c.documents) for name in c.versions
               if (name, document) not in done]  # fmt: skip
    if not missing:
        return
    study = Study(c, out)
    with Progress(len(missing) * c.length, label="reading", unit="tokens") as progress:
        for count, (name, document) in enumerate(missing, 1):
            yield from study.read(name, document)
            progress.update(count * c.length)


def stage_of(c: ConfigDict, name: str) -> Stage:
    """What the training of a version is like."""
    t = c.training
    schedule = parse_choice(t[f"{name}_schedule"], SCHEDULES, what="schedule")
    return Stage(t.steps * t.batch * t.length, t.length, t.batch, schedule, rope_base=c.rope_base)


@dataclass(frozen=True)
class DocumentRows:
    """Batches of rows that are parts of one document each: all begin, then all go on."""

    texts: Sequence[Int[np.ndarray, " _"]]  # each longer than a row
    length: int
    rows: int

    def batch(self, step: int) -> batches.Batch:
        tokens = np.stack([self._row(step * self.rows + row) for row in range(self.rows)])
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    def _row(self, index: int) -> Int[np.ndarray, " length+1"]:
        turn, document = divmod(index, len(self.texts))
        text = self.texts[document]
        start = turn % ((len(text) - 1) // self.length) * self.length
        return text[start : start + self.length + 1]


def clocks() -> Float[np.ndarray, "2"]:
    """Seconds by the clock, and of all processors."""
    return np.array([time.perf_counter(), time.process_time()])


class Study:
    """The model, its documents, and what becomes of it."""

    def __init__(self, c: ConfigDict, out: RunFolder) -> None:
        self.c, self.out = c, out
        self.lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
        count = c.training.documents + c.documents
        length = max(c.length, c.training.length + 1)
        bos = [self.lm.tokenizer.bos_id] if self.lm.tokenizer.add_bos else []
        texts = [
            (np.concatenate([np.asarray(bos, np.int32), tokens]), digest)
            for tokens, digest in _texts.tokenised(self.lm, c.text, length=length, count=count)
        ]
        # Those to train on come first, so that reading more of the others changes no training.
        self.rows = DocumentRows(
            [tokens for tokens, _ in texts[: c.training.documents]],
            c.training.length, c.training.batch,
        )  # fmt: skip
        self.held_out = texts[c.training.documents :]
        self._trained: dict[str, LM] = {}

    @cached_property
    def raised(self) -> LM:
        return dataclasses.replace(self.lm, spec=stage_of(self.c, FINETUNED).shape(self.lm.spec))

    def version(self, name: str) -> LM:
        if name in TRAINED and name not in self._trained:
            self._trained[name] = self.train(name)
        versions = {
            NONE: self.lm,
            LM_INFINITE: self.lm.with_policy(self.c.policy),
            RAISED: self.raised,
            **self._trained,
        }
        return versions[name]

    def read(self, name: str, document: int) -> Iterator[Row]:
        """The rows of a version and a held-out document, one for each block of positions."""
        lm, (text, digest) = self.version(name), self.held_out[document]
        training = self.c.training
        steps = {line["step"]: line for line in self.out.metrics() if line["version"] == name}
        started = clocks()
        nll = lm.token_nll(text[: self.c.length])
        spent = clocks() - started
        for block in perplexity.by_position([nll], block=self.c.block):
            yield {
                "model": self.c.model, "trained_length": self.lm.spec.trained_length,
                "version": name, "document": document, "text_digest": digest,
                "start": block.start, "stop": block.stop, "nll": block.nll,
                "seconds": spent[0], "processor_seconds": spent[1],
                "training_tokens": len(steps) * training.batch * training.length,
                **{f"training_{column}": sum(line[column] for line in steps.values())
                   for column in ("seconds", "processor_seconds")},
            }  # fmt: skip

    # --- Training ---------------------------------------------------------------------------------

    def program(self, name: str) -> TrainStep:
        c, spec = self.c, self.lm.spec
        devices = jax.local_devices()[: math.gcd(c.training.batch, jax.local_device_count())]
        program = TrainStep(
            spec,
            layer_policies.by_layer(FULL, windows=spec.windows, num_kv_heads=spec.num_kv_heads),
            mesh.make(mesh.MeshShape(), devices),
            partition.STRATEGIES["data"],
            parse_choice(c.training.optimizer, OPTIMIZERS, what="optimizer").build(),
            lambda step: step,  # the stage has its own
            dtype=DTYPES[known(c.training.dtype, DTYPES, "dtype")],
            remat=known(c.training.remat, REMAT, "remat policy"),
            lora=parse_choice(c.training.lora, {"lora": LoRA}, what="adapter")
            if name == LORA else None,
        )  # fmt: skip
        return Stages((stage_of(c, name),)).programs(program)[0]

    def train(self, name: str) -> LM:
        """The trained model, from the checkpoint in the run's folder if there is one."""
        program, training = self.program(name), self.c.training
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.shapes, program.shardings,
        )  # fmt: skip
        started = clocks()

        def watch(done: int, metrics: Metrics) -> None:
            nonlocal started
            loss, now = float(metrics.loss), clocks()
            seconds, processor_seconds = now - started
            self.out.append_metrics(done, {
                "version": name, "loss": loss, "seconds": seconds,
                "processor_seconds": processor_seconds,
            })  # fmt: skip
            progress.update(done, loss=loss)
            started = now

        with native.Store(str((self.out / "checkpoints" / name).absolute()), last=1) as store:
            restored = store.restore(abstract, report=print)
            state = program.start(self.lm.params) if restored is None else restored[1]
            with Progress(training.steps, label=f"training, {name}") as progress:
                state = fit(
                    program.step, state,
                    lambda step: batches.put(
                        self.rows.batch(step), mesh=program.mesh, strategy=program.strategy
                    ),
                    steps=training.steps, watch=watch, hooks=[Hook(training.every, store.save)],
                )  # fmt: skip
            if training.steps % training.every:
                store.save(training.steps, state)
            store.wait()
            params = jax.device_get(program.finished(state))
        params = jax.tree.map(lambda x: np.asarray(x, self.lm.dtype), params)
        return dataclasses.replace(self.raised, params=params)


# --- Showing --------------------------------------------------------------------------------------


def values(rows: Sequence[Row], version: str, base: str | None) -> dict[tuple[int, int], list]:
    """(start, stop) of a block -> of each document the loss, nats/token, above that of the base."""
    cells = {(row["version"], row["document"], row["start"]): row["nll"] for row in rows}
    blocks: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        below = 0.0 if base is None else cells.get((base, row["document"], row["start"]))
        if row["version"] == version and below is not None:
            blocks.setdefault((row["start"], row["stop"]), []).append(row["nll"] - below)
    return blocks


def table(rows: list[Row]) -> list[Row]:
    """Mean losses of each version by position, and paired differences with their 95 % intervals."""
    lines = []
    for version in dict.fromkeys(row["version"] for row in rows):
        of_version = [row for row in rows if row["version"] == version]
        for base in (None, *BASES):
            blocks = values(rows, version, base)
            if version == base or not blocks:
                continue
            line: Row = {"version": version, "nats/token": f"above {base}" if base else "loss"}
            for (start, stop), losses in sorted(blocks.items()):
                interval = score.over_documents(losses)
                line[f"{start}–{stop}"] = score.value_text(interval, digits=3)
            line["documents"] = max(map(len, blocks.values()))
            if base is None:
                line["tokens trained"] = of_version[-1]["training_tokens"]
                line["processor s of training"] = of_version[-1]["training_processor_seconds"]
                spent = [row["processor_seconds"] for row in of_version]
                line["processor s a document"] = float(np.median(spent))
            lines.append(line)
    return lines


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Losses by position of all versions, and above LM-Infinite of those with a raised base."""
    versions = list(dict.fromkeys(row["version"] for row in rows))
    loss = points(rows, versions, None)
    above = points(rows, [name for name in versions if name not in BASES], LM_INFINITE)
    settings = {"x": "stop", "y": "value", "by": "version", "mark": rows[0]["trained_length"],
                "x_label": "position (tokens)"}  # fmt: skip
    figures = {
        "long_context_training": plots.curves(
            loss, y_label="held-out loss (nats/token)", **settings
        )
    }
    if above:
        figures["above_lm_infinite"] = plots.curves(
            above, y_label="loss above LM-Infinite (nats/token, 95 % over documents)",
            interval=("low", "high"), **settings,
        )  # fmt: skip
    return figures


def points(rows: Sequence[Row], versions: Sequence[str], base: str | None) -> list[Row]:
    lines = []
    for version in versions:
        for (_, stop), losses in values(rows, version, base).items():
            interval = score.over_documents(losses)
            lines.append({"version": version, "stop": stop, "value": interval.mean,
                          **score.ends(interval)})  # fmt: skip
    return lines


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("documents", "versions"), check=check)
