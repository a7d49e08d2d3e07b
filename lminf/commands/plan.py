"""lminf plan: what a model costs to run, or a training run costs on devices that are not here.

lminf plan MODEL                                     parameters, FLOPs and cache bytes
lminf plan --config=train_lm:1b --devices=v5e-256    bytes on each device, sharding, hours
lminf plan --config=train_lm:7b --devices=h100x64 --search     the fastest layouts that fit
lminf plan --config=step_sweep:pod                   parameters, tokens and FLOPs of a sweep's cells

Where the compiler of those devices is installed (the extra `aot`), the step is compiled for them
and the memory that it would take stands beside that of the formula.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from lminf import checkpoints
from lminf.attention.parsing import parse_policy
from lminf.commands import sweep
from lminf.errors import InputError
from lminf.models import cost, decoder, layer_policies
from lminf.models.spec import ModelSpec
from lminf.parallel import hardware, topology
from lminf.parallel.hardware import Devices
from lminf.run import request, tables
from lminf.surgery.quantize import quantize
from lminf.train import compiled, planning
from lminf.train.step import TrainStep
from lminf.types import Params

SWEEPS = ("vocab_sweep", "step_sweep")
DEFAULT = ("full", "window:window={w}", "lm_infinite:window={w},sinks=10")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a table name, a folder, a .gguf file, owner/name"
    )
    parser.add_argument("--config", help="a training run, as train_lm takes it")
    parser.add_argument("--devices", help="for --config: v5e-256, h100x8, … (h100x8)")
    parser.add_argument(
        "--mfu", type=float, help="for --config: share of the peak to count on (0.4)"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="for --config of train_lm: the fastest layouts that fit the devices",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        help="for --search: share of the peak that products of matrices reach (0.6)",
    )
    parser.add_argument("--policy", action="append", help="may repeat; default: full and windowed")
    parser.add_argument(
        "--length", type=int, help="tokens of the text; default: 4 x trained length"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of weights and cache (float32)")  # fmt: skip
    parser.add_argument(
        "--override", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
        help="of the config, as in --override=mesh.fsdp=8; may repeat",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.config is None):
        raise InputError("give a MODEL to run or a --config to train, as in lminf plan --help")
    of_model = ("policy", "length", "dtype")
    of_config = ("devices", "mfu", "overrides", "search", "efficiency")
    for name in of_model if args.config else of_config:
        if getattr(args, name) not in (None, [], False):
            raise InputError(
                f"--{name.removesuffix('s') if name == 'overrides' else name} means nothing to a "
                f"plan of a {'--config' if args.config else 'MODEL'}; leave it out"
            )
    if args.search and args.mfu is not None:
        raise InputError(f"--mfu={args.mfu} is what --search says; give it --efficiency instead")
    args.devices, args.dtype = args.devices or "h100x8", args.dtype or "float32"
    args.mfu = 0.4 if args.mfu is None else args.mfu
    if not 0 < args.mfu <= 1:
        raise InputError(f"--mfu={args.mfu}: give a share of the peak, above 0 and up to 1")
    name = Path((args.config or "").partition(":")[0]).stem
    check_search(args, name)
    if args.search:
        from lminf.commands import _plan_search

        facts, rows = _plan_search.facts_and_layouts(args)
        show(args, facts, {"layouts": rows})
        return
    if args.config is not None:
        plan_sweep(args, name) if name in SWEEPS else plan_training(args)
        return
    spec = checkpoints.read_spec(args.model)
    length = 4 * spec.trained_length if args.length is None else args.length
    if length < 1:
        raise InputError(f"--length={length}: give at least 1 token")
    half = spec.trained_length // 2
    chosen = args.policy or [text.format(w=half) for text in DEFAULT]
    if not args.policy and (trained_policy := checkpoints.read_policy(args.model)) is not None:
        print(f"attending as trained, by {trained_policy.name} (lminf.json)", file=sys.stderr)
        chosen = [trained_policy.name, *chosen]
    products = cost.matmul_flops_per_token(spec)
    rows = []
    for text in chosen:
        policy = parse_policy(text)
        by_layer = layer_policies.by_layer(
            policy, windows=spec.windows, num_kv_heads=spec.num_kv_heads
        )
        attention = cost.attention_flops(spec, by_layer, length)
        rows.append(
            {
                "policy": policy.name,
                "flops_per_token": products + attention / length,
                "attention_share": attention / (attention + products * length),
                "cache_bytes": cost.cache_bytes(
                    spec, by_layer, tokens=length, dtype=jnp.dtype(args.dtype)
                ),
            }
        )
    facts = {
        "model": args.model,
        "family": spec.family,
        "parameters": cost.parameters(spec),
        **weight_facts(spec, jnp.dtype(args.dtype)),
        "matmul_flops_per_token": products,
        "trained_length": spec.trained_length,
        "length": length,
        "dtype": args.dtype,
    }
    show(args, facts, {"policies": rows})


def check_search(args: argparse.Namespace, name: str) -> None:
    """Refuses a search of a sweep, and settings that only a search, or only another plan, reads."""
    if args.efficiency is not None and not args.search:
        raise InputError(f"--efficiency={args.efficiency} is for --search; leave one out")
    args.efficiency = 0.6 if args.efficiency is None else args.efficiency
    if not 0 < args.efficiency <= 1:
        raise InputError(
            f"--efficiency={args.efficiency}: give a share of the peak, above 0 and up to 1"
        )
    if args.search and name in SWEEPS:
        raise InputError(f"--search is for a training run, not for the sweep {name}; leave it out")


def weight_facts(spec: ModelSpec, dtype: Any) -> dict[str, int]:
    """Bytes of a model's weights in `dtype`, and with its matrices in int8."""

    def weights() -> Params:
        params = decoder.init(spec, key=jax.random.key(0))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return {
        "weights_bytes": cost.weight_bytes(jax.eval_shape(weights)),
        "int8_weights_bytes": cost.weight_bytes(jax.eval_shape(lambda: quantize(weights()))),
    }


def plan_training(args: argparse.Namespace) -> None:
    from lminf.experiments import _training

    run_request = request.parse(
        "train_lm", [f"--config={args.config}", *(f"--config.{o}" for o in args.overrides)]
    )
    assert run_request is not None  # --help was this command's own
    c: Any = run_request.config
    _training.check(c, run_request.overrides)
    devices = hardware.parse(args.devices)
    start = _training.shape_to_plan(c)
    program = _training.program_of(c, start, absent=devices.count)
    stages = _training.stages_of(c)
    staged = list(zip(stages.programs(program), stages.stages, strict=True))
    memory, largest = max(
        ((planning.device_bytes(each, rows=s.batch, length=s.length), s) for each, s in staged),
        key=lambda taken: taken[0].total,
    )
    tokens = stages.tokens(stages.steps)
    flops = sum(
        planning.flops_per_token(each, s.length) * s.steps * s.batch * s.length
        for each, s in staged
    )
    seconds = flops / (devices.count * devices.kind.peak_flops * args.mfu)
    facts = {
        "config": args.config,
        "devices": f"{devices.count} x {devices.name}",
        "mesh": " ".join(f"{axis}={n}" for axis, n in program.mesh.shape.items() if n > 1),
        "strategy": c.strategy,
        "parameters": cost.parameters(start),
        "tokens": tokens,
        "flops": flops,
        "mfu": args.mfu,
        "hours": seconds / 3600,
        "params_bytes": memory.params,
        "grads_bytes": memory.grads,
        "optimizer_bytes": memory.optimizer,
        "activation_bytes": memory.activations,
        "transient_bytes": memory.transient,
        "total_bytes": memory.total,
        **compiled_facts(program, devices, rows=largest.batch, length=largest.length),
        "device_memory_bytes": devices.kind.memory_bytes,
        "fits": memory.total <= devices.kind.memory_bytes,
    }
    show(args, facts, {"sharding": planning.table(program)})


def compiled_facts(
    program: TrainStep, devices: Devices, *, rows: int, length: int
) -> dict[str, Any]:
    """What the compiler of these devices says; nothing, with a line that says why, without one."""
    reason = topology.missing(devices)
    if reason is not None:
        print(f"bytes are of the formula only: {reason}", file=sys.stderr)
        return {}
    print(f"compiling the step for {devices.name}: a minute or two …", file=sys.stderr)
    analysis = compiled.memory(program, devices, rows=rows, length=length)
    return {
        "compiled_state_bytes": analysis.arguments,
        "compiled_working_bytes": analysis.working,
        "compiled_total_bytes": analysis.total,
    }


def plan_sweep(args: argparse.Namespace, name: str) -> None:
    """Every shape and length of a sweep, and what all its cells cost."""
    given = [f"--config={args.config}", *(f"--config.{o}" for o in args.overrides)]
    run_request = request.parse(name, given)
    assert run_request is not None  # --help was this command's own
    devices = hardware.parse(args.devices)
    module = importlib.import_module(f"lminf.experiments.{name}")
    planned = [module.planned(cell.config) for cell in sweep.cells_of(name, run_request)]
    flops = sum(row["flops"] for row in planned)
    facts = {
        "config": args.config,
        "devices": f"{devices.count} x {devices.name}",
        "cells": len(planned),
        "runs": sum(row["runs"] for row in planned),
        "flops": flops,
        "mfu": args.mfu,
        "hours": flops / (devices.count * devices.kind.peak_flops * args.mfu) / 3600,
    }
    # Cells that differ in their batch alone cost the same.
    alike: dict[tuple, dict[str, Any]] = {}
    for row in planned:
        batch, shape_facts = (
            row["batch"],
            {k: v for k, v in row.items() if k not in ("batch", "flops")},
        )
        line = alike.setdefault(
            tuple(shape_facts.values()), {**shape_facts, "batches": "", "flops": 0.0}
        )
        line["batches"] = " ".join(filter(None, (line["batches"], str(batch))))
        line["flops"] += row["flops"]
    show(args, facts, {"shapes": list(alike.values())})


def show(args: argparse.Namespace, facts: dict, sections: dict[str, list]) -> None:
    """Facts a line each and tables, in units for people; or all as one JSON object, as it is."""
    if args.json:
        print(json.dumps({**facts, **sections}))
        return
    for key, value in facts.items():
        print(f"{named(key):24} {spelled(key, value)}")
    for rows in sections.values():
        readable = [{named(key): spelled(key, row[key]) for key in row} for row in rows]
        Console(highlight=False).print(tables.rich_table(readable))


SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))  # bytes
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))  # parameters, tokens


def named(key: str) -> str:
    """`total_bytes` as `total`: the value says its unit."""
    return key.removesuffix("_bytes").replace("_", " ")


def spelled(key: str, value: Any) -> str:
    """The value with a unit that leaves few digits: 2.1 GB, 135 M, 1.6e+20."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or value is None:
        return str(value)
    if key.endswith("length"):
        return f"{value:,}"
    size = key.endswith("bytes")
    if "flops" not in key:
        for least, prefix in SIZES if size else COUNTS:
            if value >= least:
                return f"{value / least:.3g} {prefix}{'B' if size else ''}"
    return f"{value:.3g} B" if size else f"{value:.3g}"
