"""lminf scaling plan: a sweep that fits a budget of FLOPs and hours on this machine."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lminf.atomic import atomic_write
from lminf.checkpoints import fetch
from lminf.commands.scaling import _sweep_plan as plans
from lminf.commands.scaling._arguments import Result
from lminf.configs import step_sweep, vocab_sweep
from lminf.errors import InputError
from lminf.experiments import _corpus, _small
from lminf.models import cost
from lminf.run import devices
from lminf.run import tables as show

CONFIGS = {"vocab": vocab_sweep, "step": step_sweep}
# FLOPs: months of a laptop. A cluster sweeps the variants `h100` and `pod` of the configs.
MOST = 1e18
TIMED = 8  # steps, after as many that compile


def plan(args: argparse.Namespace) -> Result:
    """The plan, its cost and run list; with --out also the list as a config file."""
    if args.flops is None and args.hours is None:
        raise InputError("give a budget: --flops, --hours or both")
    if args.flops is not None and not 0 < args.flops <= MOST:
        raise InputError(f"--flops={args.flops:.3g}: give more than 0 and at most {MOST:.0e} FLOPs")
    kind = args.subject
    text = _corpus.corpus("library")
    planned, speed = fitted(kind, args.flops, args.hours, len(text.train))
    seconds = planned.flops / speed / plans.SHARE
    factor = plans.interval(kind, planned.replicates)
    file = config_file(kind, planned)
    cells = len(planned.sizes) * len(planned.batches)  # of a group
    runs = cells * len(planned.rates) * planned.replicates
    rows = [
        {"layers": group.shape.layers, "width": group.shape.width, "N": group.shape.parameters,
         "D": group.tokens, "runs": runs, "FLOPs": f"{group.flops * runs:.3g}"}
        for group in planned.groups
    ]  # fmt: skip
    result = {
        "kind": kind,
        "groups": [
            {
                "n": group.shape.parameters,
                "width": group.shape.width,
                "layers": group.shape.layers,
                "tokens": group.tokens,
                "run_flops": group.flops,
            }
            for group in planned.groups
        ],
        "vocabularies": planned.sizes,
        "rates": planned.rates,
        "batches": planned.batches,
        "replicates": planned.replicates,
        "flops": planned.flops,
        "measured_flops_per_second": speed,
        "hours": seconds / 3600,
        "expected_interval_factor": factor,
        "config": file,
    }
    command = f"lminf sweep {kind} --config={args.out or 'FILE.py'}"
    if args.out:
        with atomic_write(Path(args.out)) as temporary:
            temporary.write_text(file)

    def say(console: Console) -> None:
        console.print(
            f"{cells * len(planned.groups)} cells of {len(planned.rates)} rates "
            f"({', '.join(f'{rate:.2g}' for rate in planned.rates)}) each: vocabularies "
            f"{', '.join(map(str, planned.sizes))}, batches of "
            f"{', '.join(map(str, planned.batches))} sequences"
        )
        console.print(show.rich_table(rows))
        console.print(
            f"cost: {planned.flops:.3g} FLOPs, {seconds / 3600:.2f} hours at the "
            f"{speed / 1e9:.1f} GFLOP/s measured here; a fifth of the time is for compiling and "
            "evaluating"
        )
        console.print(
            f"expected: the optimum within a factor {factor:.2f} (95 %), if noise and curvature "
            "are those of docs/studies"
        )
        console.print(f"run it: {command}")

    return result, say


def fitted(
    kind: str, flops: float | None, hours: float | None, text: int
) -> tuple[plans.Plan, float]:
    """(the plan, FLOP/s): of all the FLOPs, or of as many as the hours allow on this machine."""
    chosen = plans.vocab if kind == "vocab" else plans.step
    budget = math.inf if flops is None else flops
    speed = 0.0
    for _ in range(2):  # another budget means another shape, and that another speed
        first = chosen(min(budget, 1e13) if math.isinf(budget) else budget, text_tokens=text)
        speed = measured_speed(kind, first)
        if hours is None:
            return first, speed
        affordable = speed * hours * 3600 * plans.SHARE
        within = chosen(min(budget, affordable), text_tokens=text)
        if within.groups[0].shape == first.groups[0].shape:
            return within, speed
        budget = min(budget, affordable)
    return chosen(budget, text_tokens=text), speed


def measured_speed(kind: str, planned: plans.Plan) -> float:
    """FLOP/s of training two of the plan's runs side by side, here and now."""
    devices.configure(fetch.compiled_folder())
    c = config_of(kind, planned)
    c.rates, c.replicates = planned.rates[:2], 1
    c.data.vocab = planned.sizes[len(planned.sizes) // 2]
    c.data.batch = planned.batches[len(planned.batches) // 2]
    per_step = c.data.batch * c.data.length
    tokens = np.random.default_rng(0).integers(0, c.data.vocab, (2 * TIMED + 1) * per_step + 1)
    held_out = tokens[: _small.EVALUATED + 1]
    shape = _small.shape_of(c, c.data.vocab)
    times, token_counts = [], set()
    for measured in _small.train(
        c, shape, tokens, held_out, budgets=[TIMED * per_step, 2 * TIMED * per_step]
    ):
        if measured.tokens not in token_counts:
            token_counts.add(measured.tokens)
            times.append(time.monotonic())
    per_token = 6 * (cost.block_parameters(shape) + c.data.vocab * shape.width)
    copies = len(c.rates) * c.replicates
    return TIMED * per_step * per_token * copies / (times[1] - times[0])


def config_of(kind: str, planned: plans.Plan) -> Any:
    """The laptop config with the plan's grid and first group."""
    c = CONFIGS[kind].get_config("laptop")
    for name, value in settings(kind, planned).items():
        c.update_from_flattened_dict({name: value})
    return c


def settings(kind: str, planned: plans.Plan) -> dict:
    """The fields of the laptop config that the plan sets: the grid, and the first group."""
    fields = {"rates": planned.rates, "replicates": planned.replicates}
    fields |= overrides(kind, planned.groups[0])
    if kind == "vocab":  # read at checkpoints: branches would cost a fifth more than was planned
        return fields | {"data.vocabs": planned.sizes, "data.batch": planned.batches[0],
                         "decay": 0.0}  # fmt: skip
    return fields | {"data.vocab": planned.sizes[0]}


def overrides(kind: str, group: plans.Group) -> dict:
    """The fields that differ between groups."""
    shape = group.shape
    fields = {
        "model.width": shape.width, "model.num_layers": shape.layers,
        "model.num_heads": shape.heads, "model.num_kv_heads": shape.heads,
        "model.hidden_dim": shape.hidden,
    }  # fmt: skip
    if kind == "vocab":
        return fields | {"budgets": tuple(plans.budgets(group))}
    return fields | {"tokens": group.tokens}


def config_file(kind: str, planned: plans.Plan) -> str:
    """The run list as a config file for `lminf sweep`."""
    axis = ("data.vocab", planned.sizes) if kind == "vocab" else ("data.batch", planned.batches)
    groups = "".join(f"    {overrides(kind, group)!r},\n" for group in planned.groups)
    lines = [f"    c.{name} = {value!r}" for name, value in settings(kind, planned).items()]
    title = "Vocabulary sizes" if kind == "vocab" else "Learning rates and batches"
    return (
        f'"""{title} for {planned.flops:.3g} FLOPs, by lminf scaling plan.\n\n'
        f"Question   As {kind}_sweep asks\n"
        f'"""\n\n'
        f"from lminf.configs import {kind}_sweep\n"
        f"from lminf.run.sweep import cross, grid\n\n"
        f"GROUPS = (\n{groups})\n\n\n"
        f'def get_config(arg: str = ""):\n'
        f'    c = {kind}_sweep.get_config("laptop")\n' + "\n".join(lines) + "\n    return c\n\n\n"
        f'def get_sweep(c, arg: str = ""):\n'
        f'    return cross(GROUPS, grid({{"{axis[0]}": {axis[1]!r}}}))\n'
    )
