"""Trains mixtures of experts that differ in their router, and reads a held-out text with each.

Models of one seed see the same batches and read the same text, so differences between them are
paired. Each is read in two ways:

    as trained   with its capacity, and its own router: where experts choose, they compare a token
                 with all others of the batch, later ones included
    causal       as a text is written: nothing is dropped, and where experts chose, tokens choose by
                 the same scores
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest, parse_choice
from lminf.data import sources, windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.experiments import _seeds
from lminf.experiments._main import main
from lminf.experiments._small import Once
from lminf.models import cost, spec
from lminf.models.routers import ROUTERS, TokenChoice
from lminf.models.spec import ModelSpec, MoESpec
from lminf.objectives import terms
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.surgery import upcycle
from lminf.train.ensemble import Replicas
from lminf.train.schedules import SCHEDULES
from lminf.train.step import State, TrainStep
from lminf.types import Params

BASE = "token_choice"  # what the others are compared with
OTHERS = ("dense", "fine_grained", "upcycled")  # models that are no routers
MEASURES = ("largest", "dropped", "unread")


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses models that do not exist, before the others are trained."""
    if BASE not in c.models:
        raise InputError(
            f"--config.models={c.models}: what the others are compared with is missing; add {BASE}"
        )
    for name in c.models:
        if name not in OTHERS and name.partition(":")[0] not in ROUTERS:
            raise InputError(f"no model is called {name!r}; {closest(name, (*ROUTERS, *OTHERS))}")
        shape_of(c, name)
    if c.contexts < c.batch:
        raise InputError(
            f"--config.contexts={c.contexts}: rows are read {c.batch} at a time, as in training; "
            f"give at least --config.batch={c.batch}"
        )


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    rows = out.rows()
    ends = {(name, list(readings(shape_of(c, name)))[-1]) for name in c.models}
    done = {row["model"] for row in rows
            if (row["model"], row["reading"]) in ends
            and row["seed"] == c.seed + c.replicates - 1}  # fmt: skip
    out.keep(lambda row: row["model"] in done)
    if done >= set(c.models):
        return
    tokens = np.asarray(ByteTokenizer().encode(sources.text_of(c.text)))
    text, held_out = np.split(tokens, [round(len(tokens) * (1 - c.held_out))])
    measured = windows.consecutive(
        held_out, length=c.length, rows=c.batch, at_most=c.contexts // c.batch
    )
    for name in c.models:
        if name not in done:
            yield from of_model(c, name, text, measured)


def of_model(
    c: ConfigDict, name: str, text: np.ndarray, measured: Sequence[dict[str, np.ndarray]]
) -> Iterator[Row]:
    """Rows of one model: every seed, in every reading."""
    data = [Once(text, c.length, c.batch, seed) for seed in _seeds.seeds(c)]
    shape, (copies, state) = shape_of(c, name), trained(c, name, data)
    facts = {
        "model": name,
        "parameters": cost.block_parameters(shape),
        "active": cost.block_parameters(shape, active=True),
        "experts": shape.moe.experts if shape.moe else 1,
        "bytes": len(measured) * c.batch * c.length,
    }
    params = jax.tree.map(lambda leaf: leaf[:, 0], state.params)
    for reading, read_as in readings(shape).items():
        program = dataclasses.replace(copies.program, spec=read_as)
        batches = [read(program, params, batch) for batch in measured]
        means: Any = jax.tree.map(lambda *each: np.mean(each, 0), *batches)
        for i, seed in enumerate(copies.seeds):
            values = {key: float(value[i]) for key, value in means.items()}
            yield {**facts, "reading": reading, "seed": seed, **values}


@partial(jax.jit, static_argnums=0)
def read(program: TrainStep, params: Params, batch: Any) -> dict[str, Any]:
    """[seeds]: nats per byte of a batch, and what its routers did."""

    def one(params):
        model = program.model(params, batch)
        routing = model.routing()
        return {"loss": model.token_loss().nll.mean()} | {
            name: routing[name] for name in MEASURES if name in routing
        }

    return jax.vmap(one)(params)


# --- Models ---------------------------------------------------------------------------------------


def shape_of(c: ConfigDict, name: str) -> ModelSpec:
    """The shape of a model of the comparison: as many active channels in all of them."""
    if c.model.hidden_dim % c.top_k:
        raise InputError(
            f"--config.top_k={c.top_k} experts do not divide {c.model.hidden_dim} active channels; "
            f"give a divisor"
        )
    dense = dense_shape(c, c.model.hidden_dim)
    if name == "dense":
        return dense
    mixture = MoESpec(
        experts=c.experts, top_k=c.top_k, hidden_dim=c.model.hidden_dim // c.top_k, shared_dim=0,
        dense_layers=0, normalised=True, capacity_factor=c.capacity_factor,
    )  # fmt: skip
    if name == "fine_grained":
        mixture = mixture.fine_grained(c.pieces, c.shared)
    elif name not in OTHERS:
        router = parse_choice(name, ROUTERS, what="router")
        changes = {} if router.causal else {"capacity_factor": None, "normalised": False}
        mixture = dataclasses.replace(mixture, router=router, **changes)
    return dataclasses.replace(dense, moe=mixture)


def dense_shape(c: ConfigDict, hidden_dim: int) -> ModelSpec:
    sizes = {**c.model.to_dict(), "hidden_dim": hidden_dim}
    return spec.llama(vocab_size=ByteTokenizer().vocab_size, trained_length=c.length, **sizes)


def readings(shape: ModelSpec) -> dict[str, ModelSpec]:
    """The shape, and that as which a text is written; the same parameters."""
    if shape.moe is None:
        return {"causal": shape}
    router = shape.moe.router if shape.moe.router.causal else TokenChoice()
    mixture = dataclasses.replace(shape.moe, router=router, capacity_factor=None)
    return {"as trained": shape, "causal": dataclasses.replace(shape, moe=mixture)}


def trained(c: ConfigDict, name: str, data: Sequence[Once]) -> tuple[Replicas, State]:
    """The models of all seeds after the last step."""
    copies = replicas(c, shape_of(c, name))
    if name != "upcycled":
        return copies, train(c, copies, copies.init(), data, until=c.steps, label=name)
    mixture, half = copies.program.spec.moe, c.steps // 2
    assert mixture is not None
    dense = replicas(c, dense_shape(c, mixture.hidden_dim))
    dense_state = train(c, dense, dense.init(), data, until=half, label="dense, to be upcycled")

    def started(params: Params, key: jax.Array) -> State:
        _, params = upcycle.upcycle(dense.program.spec, params, mixture, key=key)
        return copies.program.state_of(params)._replace(step=jnp.int32(half))

    keys = jax.random.split(jax.random.key(c.seed), len(copies.seeds))
    state = jax.vmap(jax.vmap(started, in_axes=(0, None)))(dense_state.params, keys)
    return copies, train(c, copies, state, data, until=c.steps, label=name)


def replicas(c: ConfigDict, shape: ModelSpec) -> Replicas:
    program = dataclasses.replace(
        _seeds.program(c, schedule=c.schedule, steps=c.steps),
        spec=shape,
        objective=terms.language_modeling(shape),
    )
    return Replicas(program, _seeds.seeds(c), (schedule_of(c).peak,))


def schedule_of(c: ConfigDict) -> Any:
    return parse_choice(c.schedule, SCHEDULES, what="schedule")


def train(
    c: ConfigDict, copies: Replicas, state: State, data: Sequence[Once], *, until: int, label: str
) -> State:
    with Progress(until, label=label) as progress:
        state, _ = copies.train(
            state, data, until=until, schedule=schedule_of(c), steps=c.steps,
            progress=progress.update,
        )  # fmt: skip
    return state


# --- Showing --------------------------------------------------------------------------------------


def differences(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its loss above that of token choice, of the same seed and reading."""
    base = {(row["reading"], row["seed"]): row["loss"] for row in rows if row["model"] == BASE}
    return [
        {**row, "above": row["loss"] - base[row["reading"], row["seed"]]}
        for row in rows if (row["reading"], row["seed"]) in base
    ]  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Means over seeds with 95 % intervals (Student's t); differences are paired by seed."""
    by_model: dict[tuple[str, str], list[Row]] = {}
    for row in differences(rows):
        by_model.setdefault((row["model"], row["reading"]), []).append(row)
    lines: list[Row] = []
    for (name, reading), group in by_model.items():
        line: Row = {
            "model": name, "read": reading, "seeds": len(group), "active": group[0]["active"],
            "parameters": group[0]["parameters"],
            "loss (nats/byte)": interval([row["loss"] for row in group]),
            "above token choice": None if name == BASE else interval([r["above"] for r in group]),
        }  # fmt: skip
        if "largest" in group[0]:
            largest = float(np.mean([row["largest"] for row in group]))
            line["largest expert's share"] = (
                f"{largest:.3f} ({largest * group[0]['experts']:.2f} x)"
            )
            for column in ("dropped", "unread"):
                line[f"{column} (%)"] = f"{100 * np.mean([row[column] for row in group]):.2f}"
        lines.append(line)
    return lines


def interval(values: Sequence[float]) -> str:
    """`0.093 (0.067 to 0.119)`."""
    mean = _seeds.interval(values)
    if len(values) < 2:
        return f"{mean.mean:.3f}"
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"


def plot(rows: list[Row]) -> Figure:
    return plots.bars(
        [row for row in differences(rows) if row["model"] != BASE],
        x="model", y="above", by="reading", center=np.mean, x_label="",
        y_label="held-out loss above token choice, each seed a dot (nats/byte)",
    )  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
