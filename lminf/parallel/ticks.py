"""A schedule as arrays that a compiled loop reads, and the buffers that it needs."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lminf.parallel.schedules import Schedule

KINDS = ("", "F", "S", "B", "T", "W")  # of a tick's pass; the first is none


class Ticks(NamedTuple):
    """A schedule as arrays."""

    op: Int[np.ndarray, "ticks p"]  # index into KINDS
    microbatch: Int[np.ndarray, "ticks p"]  # of the pass; of F, B and W the virtual one
    softmax: Int[np.ndarray, " ticks"]  # the microbatch whose S is done everywhere, or -1
    hidden: Int[np.ndarray, " ticks"]  # the one whose T is


class Slots(NamedTuple):
    """Microbatches that each buffer of a device must hold at once: what a schedule costs."""

    inputs: int  # of a stage, until its backward; virtual microbatches
    gradients: int  # of a stage's output; virtual ones too
    hidden: int  # of the last stage, until T
    softmax: int  # from S until T
    parts: int  # of the gradient of hidden states, from T until the second barrier


def tabulate(schedule: Schedule) -> tuple[Ticks, Slots]:
    """The schedule as arrays, and the sizes of the buffers that serve it."""
    p, m, chunks, at_tick = schedule.devices, schedule.microbatches, schedule.form.chunks, {}
    shape = (1 + max(each.tick for each in schedule.passes), p)
    op, microbatch = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for device, tick, kind, i, chunk in schedule.passes:
        in_layers = kind in "FBW"
        at_tick[kind, schedule.stage(device, chunk) if in_layers else device, i] = tick
        op[tick, device] = KINDS.index(kind)
        microbatch[tick, device] = schedule.virtual_microbatch(i, chunk) if in_layers else i
    done = {(kind, i): max(at_tick.get((kind, device, i), -1) for device in range(p))
            for kind in "ST" for i in range(m)}  # fmt: skip
    barriers = np.full((2, len(op)), -1, np.int32)
    for (kind, i), tick in done.items():
        barriers["ST".index(kind), tick] = i if tick >= 0 else -1
    before_backward = "T" if schedule.vocab == "two_barriers" else "S"
    release = "W" if schedule.form.splits_backward else "B"
    of_layers = np.zeros((2, 2, p, m * chunks), np.int64)  # starts and ends of use of each buffer
    of_vocabulary = np.zeros((2, 3, p, m), np.int64)
    for d, i in ((d, i) for d in range(p) for i in range(m)):
        for chunk in range(chunks):
            stage, virtual = schedule.stage(d, chunk), schedule.virtual_microbatch(i, chunk)
            freed = at_tick.get((release, stage, i), at_tick["F", stage, i])
            if stage == schedule.last:
                returned = done[before_backward, i]
            else:
                returned = at_tick.get(("B", stage + 1, i), freed)
            arrived = at_tick["F", max(stage - 1, 0), i]
            of_layers[..., d, virtual] = (arrived, returned), (freed, freed)
        used = max(at_tick.get(("T", d, i), -1), done["S", i])
        of_vocabulary[..., d, i] = (
            (at_tick["F", schedule.last, i], at_tick["S", d, i], used),
            (used, used, done[before_backward, i]),
        )
    return Ticks(op, microbatch, *barriers), Slots(
        *(_ring(*each) for uses in (of_layers, of_vocabulary) for each in uses.swapaxes(0, 1))
    )


def _ring(starts: Int[np.ndarray, "p n"], ends: Int[np.ndarray, "p n"]) -> int:
    """The size of a ring in which no two of n that are in use at once have one place."""
    together = (ends[:, :, None] > starts[:, None]) & (ends[:, None] > starts[:, :, None])
    distance = np.abs(np.subtract.outer(np.arange(starts.shape[1]), np.arange(starts.shape[1])))
    return 1 + int((distance * together).max())
