"""A schedule as arrays that a compiled loop reads, and the buffers that it needs."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lminf.parallel.schedules import Schedule

KINDS = ("", "F", "S", "B", "T", "W")  # of a tick's pass; the first is none


class Ticks(NamedTuple):
    """A schedule as arrays."""

    op: Int[np.ndarray, "ticks p"]  # index into KINDS
    microbatch: Int[np.ndarray, "ticks p"]  # of the pass
    softmax: Int[np.ndarray, " ticks"]  # the microbatch whose S is done everywhere, or -1
    hidden: Int[np.ndarray, " ticks"]  # the one whose T is


class Slots(NamedTuple):
    """Microbatches that each buffer of a device must hold at once: what a schedule costs."""

    inputs: int  # of a stage, until its backward
    gradients: int  # of a stage's output
    hidden: int  # of the last stage, until T
    softmax: int  # from S until T
    parts: int  # of the gradient of hidden states, from T until the second barrier


def tabulate(schedule: Schedule) -> tuple[Ticks, Slots]:
    """The schedule as arrays, and the sizes of the buffers that serve it."""
    p, m, at_tick = schedule.devices, schedule.microbatches, {}
    shape = (1 + max(each.tick for each in schedule.passes), p)
    op, microbatch = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for device, tick, kind, i, _ in schedule.passes:
        at_tick[kind, device, i] = tick
        op[tick, device], microbatch[tick, device] = KINDS.index(kind), i
    done = {(kind, i): max(at_tick.get((kind, device, i), -1) for device in range(p))
            for kind in "ST" for i in range(m)}  # fmt: skip
    barriers = np.full((2, len(op)), -1, np.int32)
    for (kind, i), tick in done.items():
        barriers["ST".index(kind), tick] = i if tick >= 0 else -1
    last = "T" if schedule.vocab == "two_barriers" else "S"
    starts, ends = np.zeros((2, len(Slots._fields), p, m), np.int64)  # of use of each buffer
    release = "W" if schedule.form.splits_backward else "B"
    for d, i in ((d, i) for d in range(p) for i in range(m)):
        freed = at_tick.get((release, d, i), at_tick["F", d, i])
        used = max(at_tick.get(("T", d, i), -1), done["S", i])
        arrived = done[last, i] if d == p - 1 else at_tick.get(("B", d + 1, i), freed)
        starts[:, d, i] = (
            at_tick["F", max(d - 1, 0), i],
            arrived,
            at_tick["F", p - 1, i],
            at_tick["S", d, i],
            used,
        )
        ends[:, d, i] = freed, freed, used, used, done[last, i]
    # Rings: no microbatch may take the place of an earlier one that is still to be read.
    in_use = (ends[..., None, :] > starts[..., None]) & np.tri(m, dtype=bool) | np.eye(
        m, dtype=bool
    )
    slots = (np.arange(m) - in_use.argmax(-1) + 1).max((1, 2))
    return Ticks(op, microbatch, *barriers), Slots(*slots.tolist())
