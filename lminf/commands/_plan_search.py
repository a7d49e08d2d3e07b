"""What `lminf plan --search` says: the fastest layouts of a training run that fit the devices."""

import argparse
from dataclasses import asdict
from typing import Any

from lminf.commands import plan
from lminf.errors import InputError
from lminf.models import cost
from lminf.parallel import hardware
from lminf.parallel.mesh import MeshShape
from lminf.run import request
from lminf.train.plan_search import USABLE, Planned, Search

SHOWN = 5  # layouts
# Fields that the search chooses.
SEARCHED = ("mesh", "strategy", "pipeline", "remat", "grad_accum_steps")


def facts_and_layouts(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """About the run and the best layout; and a row for each of the best."""
    from lminf.experiments import _training

    parsed = request.parse(
        "train_lm", [f"--config={args.config}", *(f"--config.{o}" for o in args.overrides)]
    )
    assert parsed is not None  # --help was this command's own
    chosen = [name for name in parsed.overrides if name.partition(".")[0] in SEARCHED]
    if chosen:
        raise InputError(f"--override={chosen[0]}: --search chooses it; leave one of the two out")
    c: Any = parsed.config
    c.mesh.update(asdict(MeshShape(data=1)))
    c.strategy, c.pipeline, c.remat, c.grad_accum_steps = "data", "", "none", 1
    _training.check(c, parsed.overrides)
    shape, devices = _training.shape_to_plan(c), hardware.parse(args.devices)
    first, stages = _training.program_of(c, shape, absent=1), _training.stages_of(c)
    program, stage = max(
        zip(stages.programs(first), stages.stages, strict=True),
        key=lambda each: each[1].batch * each[1].length,
    )
    search = Search(program, devices, stage.batch, stage.length, args.efficiency)
    planned = search.best()
    layout = planned[0].layout
    facts = {
        "config": args.config,
        "devices": f"{devices.count} x {devices.name}",
        "parameters": cost.parameters(shape),
        "step": f"{stage.batch} rows of {stage.length:,} tokens",
        "efficiency": args.efficiency,
        "usable_bytes": USABLE * devices.kind.memory_bytes,
        "meshes_that_fit": len(planned),
        "overrides": " ".join(f"--config.{override}" for override in layout.overrides),
        **plan.compiled_facts(layout.of(program), devices, rows=stage.batch, length=stage.length),
    }
    return facts, [row_of(each) for each in planned[:SHOWN]]


def row_of(planned: Planned) -> dict[str, Any]:
    layout, memory = planned.layout, planned.memory
    sizes = {axis: size for axis, size in asdict(layout.sizes).items() if size > 1}
    return {
        "mesh": " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "1 device",
        "strategy": layout.strategy,
        "rows": f"{layout.micro_batch} x {layout.accumulation}",
        "remat": layout.remat,
        "schedule": layout.passes.pipeline or "-",
        "state_bytes": memory.params + memory.grads + memory.optimizer,
        "activation_bytes": memory.activations + memory.transient,
        "total_bytes": memory.total,
        "step_seconds": planned.time.total,
        "mfu": planned.mfu,
        "bottleneck": planned.time.bottleneck,
    }
