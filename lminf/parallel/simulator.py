"""What a pipeline schedule costs, and whether it keeps every dependency.

Nothing of the builder (schedules.py) is used but where a chunk's stage is: what must come before a
pass is written here a second time.
"""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from lminf.parallel.schedules import SCHEDULES, VOCABULARIES, Duration, Schedule, build


class Simulated(NamedTuple):
    """What a schedule costs."""

    ticks: int  # of the whole step
    idle: tuple[int, ...]  # [p] ticks in which a device runs nothing: the bubble
    peak: tuple[
        Fraction, ...
    ]  # [p] most activations held at once, in microbatches of a whole stage


def simulate(schedule: Schedule) -> Simulated:
    """Costs of a schedule; raises ValueError where it lacks a pass or breaks a dependency."""
    s, form = schedule, schedule.form
    p, last, barriers = s.devices, s.last, VOCABULARIES[s.vocab]
    kinds = "FB" + "W" * form.splits_backward + "ST" * bool(barriers)
    kinds += "V" * (s.vocab == "interlaced")
    start: dict[tuple[str, int, int], int] = {}
    end: dict[tuple[str, int, int], int] = {}
    for each in s.passes:
        stage = s.stage(each.device, each.chunk) if each.kind in "FBW" else each.device
        key = each.kind, stage, each.microbatch
        if key in start:
            raise ValueError(f"{key} runs twice")
        start[key], end[key] = each.tick, each.tick + s.duration(each.kind, each.device)
    expected = {(k, stage, i) for k in kinds for i in range(s.microbatches)
              for stage in range(last + 1 if k in "FBW" else p)}  # fmt: skip
    if expected != set(start):
        raise ValueError(f"missing or unknown passes: {sorted(expected ^ set(start))[:3]}")
    for (kind, stage, i), tick in start.items():
        devices = range(p)
        head = {0: [("F", last)], 1: [("S", r) for r in devices], 2: [("T", r) for r in devices]}
        if s.vocab == "interlaced":
            head[0] = [("V", r) for r in devices]
            if kind == "V" and tick != start["V", 0, i]:
                raise ValueError(f"V of microbatch {i} starts at different ticks")
        needs = {
            "F": [("F", stage - 1)] if stage else [],
            "S": [("F", last)], "V": [("F", last)], "T": [("S", r) for r in devices],
            "B": [("F", stage), *([("B", stage + 1)] if stage < last else head[barriers])],
            "W": [("B", stage)],
        }[kind]  # fmt: skip
        for needed in needs:
            if end[(*needed, i)] > tick:
                raise ValueError(f"{kind} of stage {stage}, microbatch {i}, starts before {needed}")
    ticks, idle, peak = max(end.values()), [], []
    for device in range(p):
        passes = sorted((x.tick, x.tick + s.duration(x.kind, device), x.kind) for x in s.passes
                     if x.device == device)  # fmt: skip
        if any(second[0] < first[1] for first, second in itertools.pairwise(passes)):
            raise ValueError(f"two passes of device {device} overlap")
        idle.append(ticks - sum(stop - begin for begin, stop, _ in passes))
        release = "W" if form.splits_backward else "B"
        changes = sorted([(begin, 1) for begin, _, kind in passes if kind == "F"]
                      + [(stop, -1) for _, stop, kind in passes if kind == release])  # fmt: skip
        running = [sum(step for _, step in changes[: n + 1]) for n in range(len(changes))]
        peak.append(Fraction(max(running), form.chunks))
    return Simulated(ticks, tuple(idle), tuple(peak))


def typical_duration(name: str) -> Duration:
    """Ticks where the forward of a device's layers takes 4, their backward 8, S and T one each."""
    form = SCHEDULES[name]
    ticks = {"F": 4, "B": 4 if form.splits_backward else 8, "W": 4}
    ticks = {kind: each // form.chunks for kind, each in ticks.items()} | {"S": 1, "T": 1, "V": 2}
    return lambda kind, device: ticks[kind]


def table(devices: Sequence[int] = (4, 8)) -> list[Mapping[str, Any]]:
    """Bubble and peak activations of every schedule, with four microbatches for each device.

    The bubble is idle time over idle time and the time of F, B and W; S and T do not count.
    """
    rows = []
    pairs = [(name, vocab) for name in SCHEDULES for vocab in VOCABULARIES
             if vocab != "interlaced" or name == "1f1b"]  # fmt: skip
    for name, vocab in pairs:
        row: dict[str, Any] = {"schedule": name, "vocabulary": vocab}
        for p in devices:
            options = {"devices": p, "microbatches": 4 * p, "vocab": vocab}
            simulated = simulate(build(name, duration=typical_duration(name), **options))
            idle = max(simulated.idle)
            row[f"bubble, p = {p}"] = f"{idle / (idle + 4 * p * 12):.1%}"
            row[f"peak, p = {p}"] = f"{float(simulated.peak[0]):g}"
        rows.append(row)
    return rows
