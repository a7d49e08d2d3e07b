"""The table of docs/planning.md: what the planner says of three published runs on Frontier.

    python docs/frontier.py

Published: Dash et al. 2023, arXiv:2312.12705: 22, 175 and 1,000 billion parameters reached 38.38,
36.14 and 31.96 % of the peak, the latter two on 1,024 and 3,072 devices (its abstract). Shapes
follow from the sizes, 12 L D^2. How the larger two were laid out is written down here from memory
and was not checked against the paper; of the smallest nothing is known here, so the search lays it
out.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from lminf.attention.policy import FULL
from lminf.models import cost
from lminf.models.spec import MLPSpec, ModelSpec, llama
from lminf.parallel import hardware, mesh, partition
from lminf.parallel.mesh import MeshShape
from lminf.train.layouts import Layout
from lminf.train.optim import AdamW
from lminf.train.plan_search import Planned, Search
from lminf.train.step import TrainStep
from lminf.train.step_time import recomputed_flops

PAGE = Path(__file__).resolve().parent / "planning.md"
BEGIN, END = "<!-- table: docs/frontier.py -->\n", "<!-- end of table -->\n"
LENGTH, VOCABULARY = 2048, 51_200  # tokens


class Run(NamedTuple):
    name: str
    layers: int
    width: int
    heads: int
    layout: Layout | None  # None: the best that the search finds on 64 devices, with 1,024 rows
    published: float  # share of the peak


def laid_out(*, fsdp: int, tensor: int, stage: int, accumulation: int) -> Layout:
    """As Megatron-DeepSpeed with ZeRO-1, checkpointed activations and one row at a time."""
    sizes = MeshShape(data=1, fsdp=fsdp, tensor=tensor, stage=stage)
    strategy = "zero1+tensor" if fsdp > 1 else "tensor"
    schedule = "1f1b" if stage > 1 else ""
    return Layout(sizes, strategy, 1, accumulation, "full", schedule)


RUNS = (
    Run("22B", 48, 6144, 48, None, 0.3838),
    Run("175B", 96, 12_288, 96, laid_out(fsdp=16, tensor=4, stage=16, accumulation=640), 0.3614),
    Run("1T", 128, 25_600, 128, laid_out(fsdp=6, tensor=8, stage=64, accumulation=1600), 0.3196),
)


def shape_of(run: Run) -> ModelSpec:
    """A GPT: an MLP of four times the width, without a gate."""
    shape = llama(
        vocab_size=VOCABULARY, width=run.width, num_layers=run.layers, num_heads=run.heads,
        num_kv_heads=run.heads, hidden_dim=4 * run.width, trained_length=LENGTH,
    )  # fmt: skip
    return dataclasses.replace(shape, mlp=MLPSpec(4 * run.width, "gelu", gated=False, bias=False))


def search_of(run: Run, efficiency: float) -> Search:
    shape, layout = shape_of(run), run.layout
    program = TrainStep(
        shape, (FULL,) * shape.num_layers, mesh.absent(MeshShape(data=1), 1),
        partition.STRATEGIES["data"], AdamW().build(), lambda step: step, dtype=jnp.bfloat16,
    )  # fmt: skip
    devices, rows = 64, 1024
    if layout is not None:
        devices, rows = layout.devices, layout.sizes.fsdp * layout.accumulation
    return Search(program, hardware.Devices("mi250x", devices), rows, LENGTH, efficiency)


def planned_of(run: Run, search: Search) -> Planned:
    if run.layout is None:
        return search.best()[0]
    return search.planned(run.layout, search.memory(run.layout))


def hardware_share(search: Search, planned: Planned) -> float:
    """Share of the peak that all FLOPs are, those of checkpointed activations too, as
    Megatron-DeepSpeed counts them.
    """
    again = recomputed_flops(planned.layout.remat, search.work)
    return planned.mfu * (1 + again / search.work.model_flops)


def fitted(run: Run) -> float:
    """The efficiency of products at which the model gives the published share of a run."""
    search, low, high = search_of(run, 1.0), 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        at = dataclasses.replace(search, efficiency=middle)
        share = hardware_share(at, planned_of(run, at))
        low, high = (middle, high) if share < run.published else (low, middle)
    return low


def table() -> str:
    """The rows as Markdown, with the fitted efficiency above them."""
    known = RUNS[1]
    efficiency = fitted(known)
    lines = [
        f"Products are taken to reach {efficiency:.3f} of the peak, which is fitted to the row of "
        f"{known.name}; the other two are predictions.",
        "",
        "| model | parameters | at 14 bytes each | devices | mesh | remat | GB of 64 on a device | "
        "share of the peak | published | largest loss |",
        "|---|--:|--:|--:|---|---|--:|--:|--:|---|",
    ]
    for run in RUNS:
        search = search_of(run, efficiency)
        planned, parameters = planned_of(run, search), cost.parameters(search.program.spec)
        layout = planned.layout
        sizes = {axis: n for axis, n in dataclasses.asdict(layout.sizes).items() if n > 1}
        lines.append(
            f"| {run.name} | {parameters / 1e9:,.1f} B | {14 * parameters / 1e9:,.0f} GB | "
            f"{layout.devices:,} | {' '.join(f'{axis}={n}' for axis, n in sizes.items())} | "
            f"{layout.remat} | {planned.memory.total / 1e9:.1f} | "
            f"{hardware_share(search, planned):.2%} | {run.published:.2%} | "
            f"{planned.time.bottleneck} |"
        )
    return "\n".join(lines) + "\n"


def write() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
