"""Trains sizes of one family at the same rates, and looks where each has its least loss.

The coordinate check looks at a few steps of one rate: how far they move the hidden states of a
fixed batch. In a parametrization that transfers this does not depend on the size.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.errors import InputError
from lminf.experiments import _corpus, _noise, _seeds, _small
from lminf.experiments._main import main
from lminf.models import cost, heads
from lminf.models.spec import ModelSpec
from lminf.run import plots
from lminf.run.folder import Row, RunFolder

STANDARD, COMPLETEP = "standard", "completep"


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses sizes that are no multiples of a head, before the first is trained."""
    for name in c.parametrizations:
        if name not in (STANDARD, COMPLETEP):
            raise InputError(f"--config.parametrizations={c.parametrizations}: there is no {name}; "
                             f"choose from {STANDARD} and {COMPLETEP}")  # fmt: skip
    for width in (c.base_width, *c.widths):
        if width % c.head_dim:
            raise InputError(
                f"--config.widths: {width} is no multiple of a head of {c.head_dim}; give others, "
                f"or another --config.head_dim"
            )
    _small.check(c, budgets=[c.tokens])


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    last_seed = c.seed + c.replicates - 1
    finished = {"part": "coordinate", "seed": last_seed, "step": c.coordinate_steps}
    done = {size_of(row) for row in out.rows() if finished.items() <= row.items()}
    out.keep(lambda row: size_of(row) in done)
    study = _corpus.corpus(c.data.corpus)
    tokens, held_out = study.tokens(study.tokenizers([c.data.vocab])[c.data.vocab])
    for name in c.parametrizations:
        for width, layers in sizes(c):
            facts = {"parametrization": name, "width": width, "layers": layers}
            if size_of(facts) in done:
                continue
            one = sized(c, name, width, layers)
            shape = _small.shape_of(one, c.data.vocab)
            facts["n"] = cost.block_parameters(shape)
            for measured in _small.train(one, shape, tokens, held_out, budgets=[c.tokens]):
                yield {"part": "loss", **facts, "seed": measured.seed, "lr": measured.lr,
                       "d": measured.tokens, "train_loss": measured.train_loss,
                       "loss": float(measured.nll.mean())}  # fmt: skip
            for row in coordinates(one, shape, tokens):
                yield {"part": "coordinate", **facts, **row}


def sizes(c: ConfigDict) -> list[tuple[int, int]]:
    """(width, layers), the base first."""
    wider = [(width, c.base_layers) for width in c.widths]
    deeper = [(c.base_width, layers) for layers in c.layer_counts]
    return [(c.base_width, c.base_layers), *wider, *deeper]


def size_of(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["parametrization"], row["width"], row["layers"]


def sized(c: ConfigDict, parametrization: str, width: int, layers: int) -> ConfigDict:
    """The settings of the trainings of one size."""
    heads = width // c.head_dim
    one = ConfigDict(c.to_dict())
    one.model = ConfigDict(
        {"width": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads,
         "hidden_dim": round(width * 8 / 3), "tied": False}
    )  # fmt: skip
    base = f"completep:width={c.base_width},layers={c.base_layers}"
    one.completep = base if parametrization == COMPLETEP else ""
    return one


def coordinates(c: ConfigDict, shape: ModelSpec, tokens: np.ndarray) -> Iterator[Row]:
    """Of every seed and step, how far the steps so far have moved what the last layer gives and the
    logits: root mean squares over tokens and coordinates. The batch is the first one, each time.
    """
    program = _small.program_of(c, shape)
    program = dataclasses.replace(program, learning_rate=lambda _: jnp.float32(c.coordinate_rate))
    batch = _small.Once(tokens, c.data.length, c.data.batch, c.seed).batch(0)
    batch = jax.tree.map(jnp.asarray, batch)
    positions = jnp.tile(jnp.arange(c.data.length, dtype=jnp.int32), (c.data.batch, 1))

    @jax.jit
    def outputs(params):
        (_, _), sown = program.module.apply(
            {"params": params}, batch["tokens"], positions=positions, mutable=["intermediates"]
        )
        (by_layer,) = sown["intermediates"]["layers"]["hidden"]
        hidden, _ = program.module.apply({"params": params}, batch["tokens"], positions=positions)
        return by_layer[-1], heads.lm(shape, params, hidden)

    for seed in range(c.seed, c.seed + c.replicates):
        state = program.init(key=jax.random.key(seed))
        initial = outputs(state.params)
        for done in range(1, c.coordinate_steps + 1):
            state, _ = program.step(state, batch)
            hidden, logits = (
                float(jnp.sqrt(jnp.mean((now - first) ** 2)))
                for now, first in zip(outputs(state.params), initial, strict=True)
            )
            yield {"seed": seed, "step": done, "hidden": hidden, "logits": logits}


# --- Showing --------------------------------------------------------------------------------------


def best_rates(rows: list[Row], size: tuple[str, int, int]) -> dict[int, float]:
    """Of every seed, the vertex of a parabola through its best rate and the neighbours, in log2;
    the rate itself where that is the first or the last.
    """
    log2_rates = {}
    for seed in {row["seed"] for row in rows if size_of(row) == size}:
        losses = sorted((row["lr"], row["loss"]) for row in rows
                        if size_of(row) == size and row["seed"] == seed)  # fmt: skip
        rates, values = np.log2([lr for lr, _ in losses]), np.array([loss for _, loss in losses])
        lowest = _noise.vertex(rates, values)
        log2_rates[seed] = float(rates[values.argmin()] if lowest is None else lowest[0])
    return log2_rates


def table(rows: list[Row]) -> list[Row]:
    """Of every size its best rate, by how many doublings it lies from the base's (mean and 95 %
    interval over seeds, paired), what training at the base's best rate costs in loss, and how far
    the steps of the coordinate check move hidden states and logits.
    """
    losses = [row for row in rows if row["part"] == "loss"]
    last = max((row["step"] for row in rows if row["part"] == "coordinate"), default=None)
    lines, bases = [], {}
    for size in dict.fromkeys(map(size_of, losses)):
        name, width, layers = size
        rates = best_rates(losses, size)
        base = bases.setdefault(name, rates)  # the first size is the base
        shifts = [rates[seed] - base[seed] for seed in rates if seed in base]
        near = min({row["lr"] for row in losses},
                   key=lambda lr: abs(np.log2(lr) - np.mean(list(base.values()))))  # fmt: skip
        cells = _noise.settings([row for row in losses if size_of(row) == size], ("lr",), "loss")
        least = min(np.mean(values) for values in cells.values())
        moved = {
            of: np.mean([row[of] for row in rows if row["part"] == "coordinate"
                         and size_of(row) == size and row["step"] == last])
            for of in ("hidden", "logits")
        }  # fmt: skip
        lines.append({
            "parametrization": name, "width": width, "layers": layers, "seeds": len(rates),
            "best rate": 2 ** np.mean(list(rates.values())),
            "doublings from the base's": _seeds.interval_text(shifts),
            "loss": least,
            "above it at the base's rate": np.mean(cells[(near,)]) - least
            if (near,) in cells else None,
            **{f"{of} moved": value for of, value in moved.items()},
        })  # fmt: skip
    return lines


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Losses by rate, and how far steps move the hidden states, by size."""
    losses: list[Row] = []
    for key, values in _noise.settings(
        [row for row in rows if row["part"] == "loss"],
        ("parametrization", "width", "layers", "lr"), "loss",
    ).items():  # fmt: skip
        name, width, layers, lr = key
        losses.append({"parametrization": name, "size": f"{width} × {layers}", "lr": lr,
                       "loss": float(np.mean(values))})  # fmt: skip
    moved: list[Row] = []
    for key, values in _noise.settings(
        [row for row in rows if row["part"] == "coordinate"],
        ("parametrization", "width", "layers", "step"), "hidden",
    ).items():  # fmt: skip
        name, width, layers, step = key
        moved.append({"parametrization": name, "size": f"{width} × {layers}", "step": step,
                      "moved": float(np.mean(values))})  # fmt: skip
    figures = {}
    if losses:
        figures["rate_transfer"] = plots.curves(
            losses, x="lr", y="loss", by="size", panel="parametrization", log_x=True,
            x_label="peak learning rate (per step)", y_label="held-out loss (nats/token)",
        )  # fmt: skip
    if moved:  # an interrupted run may have none
        figures["coordinate_check"] = plots.curves(
            moved, x="step", y="moved", by="size", panel="parametrization",
            x_label="optimiser steps (steps)", y_label="change of hidden states (RMS)",
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, check=check)
