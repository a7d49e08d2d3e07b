"""Trains a language model; the same command with the same --out resumes it."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf import checkpoints
from lminf.atomic import check_space
from lminf.attention.policy import FULL
from lminf.checkpoints import native
from lminf.config import from_config
from lminf.errors import InputError
from lminf.experiments import _training
from lminf.experiments._main import leads, main
from lminf.lm.lm import LM
from lminf.lm.nll import bits_per_byte
from lminf.parallel import hardware
from lminf.parallel.distributed import Distributed
from lminf.run import environment, lock, memory, plots, request, trackers
from lminf.run.clock import PhaseTimer
from lminf.run.folder import Row, RunFolder, difference
from lminf.run.metrics import Smoothed
from lminf.run.preemption import Preemption
from lminf.run.progress import Progress
from lminf.train import batches, planning
from lminf.train.loop import Hook, fit, refuse
from lminf.train.step import Metrics, State, TrainStep
from lminf.types import Params

check = _training.check


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    memory.keep_pages()
    check(c)
    stages = _training.stages_of(c)
    ended = finished(c, out, stages.steps)
    if c.export and not ended:
        checkpoints.check_save(c.export)  # before the model is read
    start = _training.start_of(c)
    programs = stages.programs(_training.program_of(c, start.spec, start.policy))
    program = programs[-1]
    place = {"mesh": program.mesh, "strategy": program.strategy}
    share = batches.share(**place)
    data = _training.data_of(c, start.tokenizer, share, vocab_size=start.spec.vocab_size)
    for shape in data.shapes:
        example = dict.fromkeys(("tokens", "targets"), np.zeros(shape, np.int32))
        batches.check(example, pieces=program.pieces, arrays=program.arrays, **place)
    lm = LM(program.spec, {}, start.tokenizer, start.policy)
    if not ended:
        check_ending(c, program, lm)
    facts = {"config": c.to_json(), "source": environment.commit()}
    folder_of = c.checkpoint.folder or str(out / "checkpoints")
    store = native.Store(absolute(folder_of), last=c.checkpoint.last, facts=facts)
    stopping = Preemption()
    if start.policy != FULL and not c.attention:
        say(f"attending as {c.init} was trained, by {start.policy.name} (lminf.json)")
    # Several processes must stop after the same step, which JAX settles: signals are left to it.
    alone = jax.process_count() == 1
    listening = stopping.listening() if alone else contextlib.nullcontext()
    needed = 0 if ended else _training.state_bytes(program)
    with (
        checkpoint_folder(store, c, steps=stages.steps, needed=needed) as planned,
        store,
        listening,
    ):
        state = initial_state(program, start, store, seed=c.seed)
        done = int(state.step)
        if ended and done >= stages.steps:
            return
        check_rows(out, store, done, stages.steps)
        if done:
            say(f"going on from step {done}")
        if done and planned != c.steps and (moved := _training.rates_moved(c, planned, done)):
            say(moved)
        if leads():
            out.keep_until(done)
            out.keep(lambda row: row["part"] not in AT_THE_END)
        watch = Watch(c, stages, programs, data, out, done, skipped=int(state.skipped))
        watch.trackers = trackers.opened(c.watch if leads() else "", out.path, c.to_dict())
        evaluator = Evaluator(data.held_out, _training.token_bytes(start.tokenizer), place)
        compiled = [watch.split.compiling(each.step, key=lambda _, batch: shapes(batch))
                    for each in programs]  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.enter_context(watch.progress)
            for watcher in watch.trackers:
                stack.callback(watcher.close)
            for until in _training.boundaries(done, stages.ends, c.evaluate.every):
                stage, _ = stages.find(done)
                state = fit(
                    compiled[stage],
                    state,
                    lambda step: batches.put(data.train.batch(step), **place, share=share),
                    steps=until,
                    watch=watch,
                    not_finite=watch.not_finite,
                    hooks=[Hook(c.checkpoint.every, partial(save, store, watch, unless=until))],
                    stop=partial(should_stop, stopping),
                )
                done = int(state.step)
                if done < until and done % c.checkpoint.every:  # else the hook has saved it
                    save(store, watch, done, state)
                elif done == until:  # also when asked to stop: the loss is due
                    with watch.split.part("eval"):
                        evaluated = evaluator(programs[stage], state)
                    watch.show(done, {f"held_out_{name}": x for name, x in evaluated.means.items()})
                    yield {"part": "loss", "step": done, "tokens": stages.tokens(done),
                           "train_loss": watch.smoothed, **evaluated.means,
                           **watch.split.seconds()}  # fmt: skip
                    save(store, watch, done, state, loss=evaluated.means["loss"])
                if done < until or should_stop(stopping, done):
                    store.wait()
                    say(f"saved step {done}; the same command goes on from there")
                    raise stopping.ending()
        with watch.split.part("eval"):
            evaluated = evaluator(program, state)
        for first, last, nll in evaluated.by_position:
            yield {"part": "position", "step": done, "start": first, "stop": last, "loss": nll}
        if not (c.evaluate.sample or c.export):
            return
        lm = dataclasses.replace(lm, params=gathered(program, program.finished(state)))
        if c.evaluate.sample and leads():
            text = lm.generate(PROMPT, max_new_tokens=c.evaluate.sample)
            yield {"part": "sample", "step": done, "text": f"{PROMPT}{text}"}
        if c.export and leads():
            checkpoints.save(c.export, as_checkpoint(lm))


PROMPT = "The "  # of the sample
AT_THE_END = ("position", "sample")  # parts that are measured once all steps are done
EIGHTHS = 8  # of the window, with a loss each


def finished(c: ConfigDict, out: RunFolder, steps: int) -> bool:
    """Whether an earlier call of the command did all that this one would; the process that has the
    rows tells the others.
    """
    rows = out.rows() if leads() else []
    for row in [*rows, *(out.metrics() if leads() else [])]:
        if type(row.get("step")) is not int:
            raise InputError(f"{out.path} holds rows without a whole number of steps, which are "
                             f"not of this run; name another folder with --out")  # fmt: skip
    at_end = [row["part"] for row in rows if row["step"] == steps]
    done = (
        at_end.count("position") == min(EIGHTHS, c.data.length)
        and (not c.evaluate.sample or "sample" in at_end)
        and (not c.export or Path(c.export).exists())
    )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    return done


def check_rows(out: RunFolder, store: native.Store, done: int, steps: int) -> None:
    """Refuses a finished run whose losses are in another folder: there would be none to draw."""
    if done >= steps and leads() and not any(row["part"] == "loss" for row in out.rows()):
        raise InputError(
            f"{store.folder} holds all {done} steps of this run, but {out.path} none of its "
            f"losses; name the run's own folder with --out, or give more --config.steps"
        )


def as_checkpoint(lm: LM) -> checkpoints.Checkpoint:
    return checkpoints.Checkpoint(lm.spec, lm.params, lm.tokenizer, "", lm.policy)


def check_ending(c: ConfigDict, program: TrainStep, lm: LM) -> None:
    """Refuses what could not be done with the finished model, before the first step."""
    if c.evaluate.sample:
        lm.check_length(len(lm.encode(PROMPT)[0]) + c.evaluate.sample)
    if c.export:
        checkpoints.check_save(c.export, as_checkpoint(lm), needed=_training.export_bytes(program))


def absolute(folder: str) -> str:
    """The folder by its whole name, as Orbax wants it; gs://… and the like have one."""
    return folder if "://" in folder else os.path.abspath(folder)


@contextlib.contextmanager
def checkpoint_folder(
    store: native.Store, c: ConfigDict, *, steps: int, needed: int
) -> Iterator[int]:
    """Locks the folder of checkpoints, which must be new or this run's; yields the number of steps
    that an earlier call planned.
    """
    store.check_folder()
    latest = max((saved.step for saved in store.saved()), default=0)
    if latest > steps:
        raise InputError(
            f"--config.steps={steps}: {store.folder} holds {latest} steps of this run; give as "
            f"many or more, or begin again in another folder with --out"
        )
    earlier, now = store.settings(), json.loads(json.dumps(request.to_dict(c)))
    may_change = (*_training.MAY_CHANGE, "checkpoint")
    if earlier is not None and (changed := difference(earlier, now, may_change=may_change)):
        raise InputError(
            f"{store.folder} holds checkpoints of a run with {changed}; give it the same settings "
            f"to go on with it, or name another folder with --config.checkpoint.folder"
        )
    planned = c.steps if earlier is None else earlier.get("steps", c.steps)
    path = Path(store.folder)
    if not leads() or "://" in str(store.folder):  # a lock is no use in an object store
        if leads():
            store.own(now)
        yield planned
        return
    check_space(path / "state", needed)
    with lock.held(path, option="--config.checkpoint.folder"):
        store.check_folder()
        store.own(now)
        yield planned


def initial_state(
    program: TrainStep, start: _training.Start, store: native.Store, *, seed: int
) -> State:
    """The state of the latest checkpoint, or the first one."""
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.shapes, program.shardings,
    )  # fmt: skip
    remarks: list[str] = []
    restored = store.restore(abstract, report=remarks.append)
    for remark in remarks:  # where none can be read, one sentence says so
        say(remark)
    if restored is not None:
        return restored[1]
    if start.params is not None:
        return program.start(start.params)
    return program.init(key=jax.random.key(seed))


def save(
    store: native.Store,
    watch: "Watch",
    done: int,
    state: State,
    *,
    loss: float | None = None,
    unless: int | None = None,
) -> None:
    if done != unless:  # that one is saved with its loss
        with watch.split.part("save"):
            store.save(done, state, loss=loss)


def should_stop(stopping: Preemption, done: int) -> bool:
    """Whether every process should stop after this step."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(done)
    return stopping.signal is not None


def shapes(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def gathered(program: TrainStep, tree: Params) -> Params:
    """The arrays in the memory of every process."""
    if jax.process_count() > 1:  # a process can fetch only what lies on its own devices
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        tree = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)
    return jax.tree.map(np.asarray, jax.device_get(tree))


def say(text: str) -> None:
    """Prints it once, however many processes there are."""
    if leads():
        print(text, file=sys.stderr)


class Watch:
    """Looks at every step: metrics.jsonl, the progress line, losses that are not finite."""

    def __init__(self, c, stages, programs, data, out, done, *, skipped):
        self.c, self.data, self.out, self.skipped = c, data, out, skipped
        self.stages = stages
        earlier = out.metrics()[-1:] if leads() else []
        self.split = PhaseTimer(*earlier)
        self.progress = Progress(stages.steps, label="training", start=done)
        self.average, self.smoothed = Smoothed(half_life=20), None
        peak = hardware.peak_flops(jax.local_devices()[0]) * programs[0].mesh.size
        self.seconds_per_token = [  # of each stage at full speed
            planning.flops_per_token(program, stage.length) / peak
            for program, stage in zip(programs, stages.stages, strict=True)
        ]
        self.last = (done, self.split.seconds()["seconds_train"])
        self.traced = None
        self.trackers: Sequence[trackers.Tracker] = ()

    def __call__(self, done, metrics):
        loss = float(metrics.loss)
        if math.isfinite(loss):
            self.smoothed = self.average.add(loss)
        self.progress.update(done, loss=self.smoothed or loss)
        self.trace(done)
        if not leads() or done % self.c.log_every:
            return
        seconds = self.split.seconds()
        tokens = self.stages.tokens(done) - self.stages.tokens(self.last[0])
        train = seconds["seconds_train"] - self.last[1]
        self.last = (done, seconds["seconds_train"])
        speed = tokens / train if train > 0 else 0.0
        stage, _ = self.stages.find(done - 1)
        values = {
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": float(metrics.grad_norm) if metrics.finite else None,
            "rate": float(metrics.learning_rate),
            "skipped": self.skipped,
            "tokens_per_second": speed,
            "mfu": speed * self.seconds_per_token[stage],
            "memory_bytes": memory.peak_bytes(),
            **{name: float(value) for name, value in metrics.reported.items()},
            **seconds,
        }
        self.out.append_metrics(done, values)
        self.show(done, values)

    def show(self, done: int, values: Mapping[str, Any]) -> None:
        for watcher in self.trackers:
            watcher.add(done, values)

    def not_finite(self, done: int, metrics: Metrics) -> None:
        if self.c.not_finite == "skip":
            self.skipped += 1
            return
        try:
            refuse(done, metrics)
        except InputError as error:
            documents = self.data.train.documents(done - 1)
            named = ", ".join(map(str, documents[:8])) + (", …" if len(documents) > 8 else "")
            raise InputError(
                f"{error}. Its rows hold text of the documents {named} (counted from 0); "
                f"--config.not_finite=skip leaves out such steps"
            ) from None

    def trace(self, done: int) -> None:
        if not self.c.profile:
            return
        first, last = self.c.profile
        if done == first:
            jax.profiler.start_trace(str(self.out / "profile"))
        if done == last:
            jax.profiler.stop_trace()


class Evaluation:
    """Losses of the held-out text, by position in its window."""

    def __init__(self, nll, byte_counts):
        # nll [rows, T], byte_counts [rows, T]
        self.nll = nll
        self.means = {
            "loss": float(nll.mean(dtype=np.float64)),
            "bits_per_byte": bits_per_byte(nll, int(byte_counts.sum())),
        }

    @property
    def by_position(self) -> Iterator[tuple[int, int, float]]:
        """(first, one past the last, nats per token) over eighths of the window."""
        length = self.nll.shape[1]
        edges = [length * i // EIGHTHS for i in range(EIGHTHS + 1)]
        for first, last in itertools.pairwise(edges):
            if last > first:
                yield first, last, float(self.nll[:, first:last].mean(dtype=np.float64))


class Evaluator:
    """The loss of the held-out batches."""

    def __init__(self, held_out, token_bytes, place):
        self.held_out, self.token_bytes = held_out, token_bytes
        self.placed = [batches.put(batch, **place) for batch in held_out]

    def __call__(self, program, state) -> Evaluation:
        nll = [np.asarray(program.nll(state, batch)) for batch in self.placed]
        targets = np.concatenate([batch["targets"] for batch in self.held_out])
        return Evaluation(np.concatenate(nll), self.token_bytes[targets])


def table(rows: list[Row]) -> list[Row]:
    """The loss over time."""
    keys = ("step", "tokens", "train_loss", "loss", "bits_per_byte", "seconds_train")
    return [{key: row[key] for key in keys} for row in rows if row["part"] == "loss"]


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    curve = [
        {"step": row["step"], "loss": row[key], "text": name}
        for row in rows
        if row["part"] == "loss"
        for key, name in (("loss", "held out"), ("train_loss", "training"))
    ]
    positions = [{**row, "text": "held out"} for row in rows if row["part"] == "position"]
    figures = {"train_lm": plots.curves(curve, x="step", y="loss", by="text",
                                        x_label="optimiser steps (steps)",
                                        y_label="loss (nats/token)")}  # fmt: skip
    if positions:
        figures["by_position"] = plots.curves(
            positions, x="stop", y="loss", by="text",
            x_label="position (tokens)", y_label="loss (nats/token)",
        )  # fmt: skip
    return figures


def join(c: ConfigDict) -> None:
    from_config(c.processes, Distributed).join()


if __name__ == "__main__":
    main(
        run, plot, table=table, resumes=True, may_change=_training.MAY_CHANGE, check=check,
        before=join,
    )  # fmt: skip
