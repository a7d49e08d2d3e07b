"""The vocabulary's share of a training step's time and memory, by its size and parallel strategy.

Planned rows are of a model on accelerators that need not be here, by the time and memory model of
`lminf plan --search`. There the vocabulary's part is what the same layers without embedding and
head would not take. Compiled rows are of a small model on several CPU devices: the bytes that XLA
lays out, beside those of the same memory model. No step is run.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.policy import FULL
from lminf.errors import InputError
from lminf.experiments._main import main
from lminf.kernels.common import platforms
from lminf.models.spec import ModelSpec, llama
from lminf.parallel import hardware, mesh, partition
from lminf.parallel.mesh import MeshShape
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import compiled, layouts, plan_search, step_time
from lminf.train.layouts import Layout
from lminf.train.optim import AdamW
from lminf.train.step import TrainStep

# Name in rows -> the mesh axis over which all devices lie, the strategy, the planner's schedule.
STRATEGIES = {
    "data": ("data", "data", ""),
    "zero2": ("fsdp", "zero2", ""),
    "fsdp": ("fsdp", "fsdp", ""),
    "tensor": ("tensor", "tensor", ""),
    "1f1b, last stage": ("stage", "data", "1f1b"),
    "1f1b, one barrier": ("stage", "data", "1f1b_vocab"),
}
SOURCES = {"compiled": "bytes_per_token", "planner's model": "bytes_per_token_model"}


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses devices that a strategy cannot divide the model or the batch over."""
    for part, count in ((c.planned, hardware.parse(c.planned.devices).count),
                        (c.compiled, c.compiled.devices)):  # fmt: skip
        sizes = {"rows": part.rows, "layers": part.model.num_layers, "heads": part.model.num_heads}
        for what, size in sizes.items():
            if size % count:
                raise InputError(
                    f"{size} {what} do not divide over {count} devices, as one of the strategies "
                    f"would; give a multiple"
                )


def before(c: ConfigDict) -> None:
    """Makes JAX see enough CPU devices."""
    jax.config.update("jax_num_cpu_devices", c.compiled.devices)


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    programs = [
        program_of(c.planned.model, vocab_size, c.planned.length, dtype=jnp.bfloat16)
        for vocab_size in c.vocab_sizes
    ]
    yield from (planned(c, name, program) for name in STRATEGIES for program in programs)
    # A device that has another share of the vocabulary than its neighbours runs another program.
    names = [name for name in STRATEGIES if name != "1f1b, last stage"]
    with Progress(len(names), label="compiling", unit="strategies") as progress:
        for done, name in enumerate(names, 1):
            yield measured(c.compiled, name)
            progress.update(done)


# --- Accelerators that are not here ---------------------------------------------------------------


def planned(c: ConfigDict, name: str, program: TrainStep) -> Row:
    """The step's time and the bytes of its fullest device, and the vocabulary's part of each."""
    p, devices = c.planned, hardware.parse(c.planned.devices)
    layout = layout_of(name, devices.count, p.rows, p.remat)
    sharded = layouts.sharded_bytes(program, layout.sizes, layout.strategy)
    work = step_time.work_of(program, rows=p.rows, length=p.length)
    layers_work = dataclasses.replace(work, head=0.0, model_flops=work.model_flops - 3 * work.head)
    layers_only = dataclasses.replace(sharded, vocabulary=np.zeros(3), tables=0.0)

    def costs(sharded, work):
        memory = layouts.memory(layout, sharded, program, length=p.length)
        time = step_time.step_time(
            layout, sharded, work, memory, devices.kind, efficiency=p.efficiency
        )
        return memory, time

    (memory, time), (layers_memory, layers_time) = (
        costs(sharded, work), costs(layers_only, layers_work)
    )  # fmt: skip
    return {
        "part": "planned", "strategy": name, "vocab_size": program.spec.vocab_size,
        "devices": f"{devices.count} x {devices.name}",
        "seconds": time.total,
        "vocab_time_share": 1 - layers_time.total / time.total,
        "device_bytes": memory.total,
        "vocab_bytes": memory.total - layers_memory.total,
        "mfu": step_time.mfu(time, layout, work, devices.kind),
        "fits": memory.total <= plan_search.USABLE * devices.kind.memory_bytes,
    }  # fmt: skip


def layout_of(name: str, devices: int, rows: int, remat: str) -> Layout:
    """All devices along the strategy's axis, one row at a time."""
    axis, strategy, schedule = STRATEGIES[name]
    sizes = MeshShape(**{"data": 1, axis: devices})
    pieces = rows // (sizes.data * sizes.fsdp)
    return Layout(sizes, strategy, 1, pieces, remat, schedule)


def program_of(model: ConfigDict, vocab_size: int, length: int, *, dtype: Any) -> TrainStep:
    """A training step on one device; a layout puts it elsewhere."""
    spec: ModelSpec = llama(vocab_size=vocab_size, trained_length=length, **model.to_dict())
    return TrainStep(
        spec, (FULL,) * spec.num_layers, mesh.absent(MeshShape(data=1), 1),
        partition.STRATEGIES["data"], AdamW().build(), lambda step: step, dtype=dtype,
    )  # fmt: skip


# --- CPU devices ----------------------------------------------------------------------------------


def measured(p: ConfigDict, name: str) -> Row:
    """Bytes of each device for one token more in the vocabulary, compiled and by the memory model.
    Both are differences of two sizes, because what a step takes is linear in the size.
    """
    layout = layout_of(name, p.devices, p.rows, p.remat)
    costs = []
    for vocab_size in p.vocab_sizes:
        program = program_of(p.model, vocab_size, p.length, dtype=jnp.float32)
        sharded = layouts.sharded_bytes(program, layout.sizes, layout.strategy)
        model = layouts.memory(layout, sharded, program, length=p.length).total
        costs.append((compiled_bytes(p, layout, program), model))
    (few, few_model), (many, many_model) = costs
    tokens = p.vocab_sizes[1] - p.vocab_sizes[0]
    return {
        "part": "compiled", "strategy": name, "devices": f"{p.devices} x cpu",
        "width": p.model.width, "from_tokens": p.vocab_sizes[0], "to_tokens": p.vocab_sizes[1],
        "bytes_per_token": (many - few) / tokens,
        "bytes_per_token_model": (many_model - few_model) / tokens,
    }  # fmt: skip


def compiled_bytes(p: ConfigDict, layout: Layout, program: TrainStep) -> int:
    """Bytes of each device in a step as XLA lays it out."""
    cpus = jax.devices("cpu")
    program = dataclasses.replace(layout.of(program), mesh=mesh.make(layout.sizes, cpus))
    arguments = compiled.shapes_of(program, p.rows, p.length)
    step: Any = program.step  # jitted
    with platforms.assuming(cpus[0]):
        return compiled.memory_of(step.lower(*arguments).compile()).total


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    large = [
        {**row, "percent": 100 * row["vocab_time_share"], "gb": row["vocab_bytes"] / 1e9}
        for row in rows if row["part"] == "planned"
    ]  # fmt: skip
    where = large[0]["devices"]
    small = [
        {**row, "source": source, "kb": row[column] / 1e3}
        for row in rows if row["part"] == "compiled" for source, column in SOURCES.items()
    ]  # fmt: skip
    common = {"x": "vocab_size", "x_label": "vocabulary (tokens)", "log_x": True}
    return {
        "time": plots.curves(
            large, y="percent", by="strategy", y_limits=(0, None),
            y_label="vocabulary's share of the step time (%)",
            title=f"{where}, by the planner's model", **common,
        ),
        "memory": plots.curves(
            large, y="gb", by="strategy", y_limits=(0, None),
            y_label="vocabulary on the fullest device (GB)",
            title=f"{where}, by the planner's model", **common,
        ),
        "compiled": plots.bars(
            small, x="strategy", y="kb", by="source", x_label="",
            y_label="memory of a device for each token of the vocabulary (kB)",
            title=f"{small[0]['devices']}, width {small[0]['width']}",
        ),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """A quantity of a strategy a line, a vocabulary size a column."""
    quantities = {
        "time of the vocabulary (%)": lambda row: 100 * row["vocab_time_share"],
        "MFU (%)": lambda row: 100 * row["mfu"],
        "memory of the vocabulary (GB)": lambda row: row["vocab_bytes"] / 1e9,
        "memory in all (GB)": lambda row: row["device_bytes"] / 1e9,
    }
    planned_rows = [row for row in rows if row["part"] == "planned"]
    lines = [
        {"devices": planned_rows[0]["devices"], "quantity": quantity, "strategy": name,
         **{f"{row['vocab_size']:,} tokens": f"{value(row):.1f}" for row in planned_rows
            if row["strategy"] == name}}
        for quantity, value in quantities.items()
        for name in STRATEGIES
    ]  # fmt: skip
    return lines + [
        {"devices": row["devices"], "quantity": f"memory of each token (kB), {source}",
         "strategy": row["strategy"], "any number": f"{row[column] / 1e3:.2f}"}
        for source, column in SOURCES.items()
        for row in rows if row["part"] == "compiled"
    ]  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, check=check, before=before)
