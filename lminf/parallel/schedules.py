"""Pipeline schedules as data: which pass of which microbatch a device runs at which tick.

    F  forward of a chunk of layers            B  its backward; where W is a pass, of the input only
    W  gradient of the chunk's weights         S  this device's part of the softmax
    T  gradient of this device's rows of the head (and, with two barriers, of the hidden states)
    V  S and T at once, on all devices at the same time

With the vocabulary divided over all devices, F(last) -> S everywhere -> one barrier -> B(last), T;
or F(last) -> S everywhere -> barrier -> T everywhere -> barrier -> B(last).
Sources: Huang et al. 2019, arXiv:1811.06965 (GPipe); Narayanan et al. 2021, arXiv:2104.04473
(1F1B, interleaved); Qi et al. 2024, arXiv:2401.10241 (zero bubble) and arXiv:2405.15362 (V-Half);
Yeung et al. 2024, arXiv:2411.05288 (the vocabulary).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from lminf.config import closest
from lminf.errors import InputError

VOCABULARIES = {"last_stage": 0, "one_barrier": 1, "two_barriers": 2, "interlaced": 0}  # barriers
PRIORITY = "TSFBW"  # of the passes that a device could run, the first: its idle time is the least
Duration: TypeAlias = Callable[[str, int], int]  # ticks of a pass, by its kind and its device


class Pass(NamedTuple):
    """One box of a pipeline diagram."""

    device: int
    tick: int  # at which it starts
    kind: str
    microbatch: int
    chunk: int = 0  # of the device's chunks of layers


@dataclass(frozen=True)
class Schedule:
    """All passes of one step."""

    name: str
    vocab: str
    devices: int  # p
    microbatches: int  # m
    duration: Duration
    passes: tuple[Pass, ...] = ()

    @property
    def form(self) -> "Form":
        return SCHEDULES[self.name]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(each.kind for each in self.passes)

    @property
    def last(self) -> int:
        """The last stage: as many stages as devices and chunks, one after another."""
        return self.devices * self.form.chunks - 1

    def stage(self, device: Any, chunk: Any) -> Any:
        """The stage that a chunk of a device is, from 0 at the embedding on."""
        return chunk * self.devices + self._reversed_in(chunk, device)

    def device_and_chunk(self, stage: Any) -> tuple[Any, Any]:
        """Where a stage is; int or array."""
        chunk, index = stage // self.devices, stage % self.devices
        return self._reversed_in(chunk, index), chunk

    def _reversed_in(self, chunk: Any, device: Any) -> Any:
        """V: down with the first chunk, up with the second."""
        turns = chunk if self.form.v_shaped else 0
        return device + turns * (self.devices - 1 - 2 * device)

    # A microbatch in one chunk of the layers is a virtual microbatch, as in Megatron-LM. They are
    # numbered about in the order of the forward passes: a group of microbatches in each chunk, then
    # the next group.

    @property
    def _group(self) -> int:
        return 1 if self.form.v_shaped else self.devices

    def virtual_microbatch(self, microbatch: Any, chunk: Any) -> Any:
        """The number of a microbatch in a chunk; of both, int or array."""
        group, index = microbatch // self._group, microbatch % self._group
        return (group * self.form.chunks + chunk) * self._group + index

    def microbatch_and_chunk(self, virtual: Any) -> tuple[Any, Any]:
        """What a virtual microbatch is."""
        block, index = virtual // self._group, virtual % self._group
        return block // self.form.chunks * self._group + index, block % self.form.chunks


class Form(NamedTuple):
    """How the devices of a schedule order their passes."""

    chunks: int  # of layers, on each device
    splits_backward: bool  # whether W is a pass of its own
    v_shaped: bool  # whether the second chunks lie in the reverse order
    # (p, device, m) -> (chunk, microbatch) of each F and of each B, in order
    order: Callable[[int, int, int], tuple[Sequence, Sequence]]
    # (p, device, m) -> most microbatches x chunks between F and B, and between F and W
    max_in_flight: Callable[[int, int, int], tuple[int, int]]


def _sequential(p: int, device: int, m: int) -> tuple[Sequence, Sequence]:
    order = [(0, microbatch) for microbatch in range(m)]
    return order, order


def _interleaved_order(p: int, device: int, m: int) -> tuple[Sequence, Sequence]:
    """p microbatches through the first chunk, the same p through the second, the next p."""
    forward = [(c, g * p + i) for g in range(m // p) for c in (0, 1) for i in range(p)]
    return forward, [(1 - c, i) for c, i in forward]


def _v_order(p: int, device: int, m: int) -> tuple[Sequence, Sequence]:
    """By when they start in the repeating block of six ticks, in which no two passes of a device
    collide: two ticks from one device to the next with the first chunk, one with the second."""
    forward = (2 * device, 3 * p - 2 - device)
    backward = (6 * p - 2 + 3 * (p % 2 == 0) - device, 3 * p - 1 + 2 * device)

    def ordered(starts):
        starts_of_passes = [(starts[c] + 6 * i, c, i) for c in (0, 1) for i in range(m)]
        return [(chunk, microbatch) for _, chunk, microbatch in sorted(starts_of_passes)]

    return ordered(forward), ordered(backward)


def _interleaved_in_flight(p: int, device: int, m: int) -> tuple[int, int]:
    """As many as Megatron-LM warms up with, in microbatches x chunks, and one."""
    limit = 3 * p - 2 * device - 1
    return limit, limit


SCHEDULES = {
    "gpipe": Form(1, False, False, _sequential, lambda p, d, m: (m, m)),
    "1f1b": Form(1, False, False, _sequential, lambda p, d, m: (p - d, p - d)),
    "interleaved": Form(2, False, False, _interleaved_order, _interleaved_in_flight),
    "zero_bubble": Form(1, True, False, _sequential, lambda p, d, m: (p - d, p)),
    "v_half": Form(2, True, True, _v_order, lambda p, d, m: (p + 1, p + 2)),
}


def one_tick(kind: str, device: int) -> int:
    """Every pass takes one tick."""
    return 1


@functools.cache
def build(
    name: str, *, devices: int, microbatches: int, vocab: str, duration: Duration = one_tick
) -> Schedule:
    """The schedule of that name over `devices`, each pass as early as its device's order allows."""
    for word, table, what in ((name, SCHEDULES, "schedule"), (vocab, VOCABULARIES, "vocabulary")):
        if word not in table:
            raise InputError(f"no pipeline {what} is called {word!r}; {closest(word, table)}")
    if name != "gpipe" and microbatches < devices:
        raise InputError(
            f"{name} over {devices} stages needs at least {devices} microbatches, not "
            f"{microbatches}; give more microbatches, or take gpipe"
        )
    if name == "interleaved" and microbatches % devices:
        raise InputError(
            f"interleaved sends microbatches in groups of {devices}, the stages, which does not "
            f"divide {microbatches}; give a multiple"
        )
    if vocab == "interlaced" and name != "1f1b":
        raise InputError(f"{name} has no interlaced form; take 1f1b, or one_barrier")
    schedule = Schedule(name, vocab, devices, microbatches, duration)
    passes = _interlaced(schedule) if vocab == "interlaced" else _greedy(schedule)
    return Schedule(name, vocab, devices, microbatches, duration, tuple(sorted(passes)))


class _Builder:
    """What has run so far, and when it ends."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.passes = schedule, []
        self.end: dict[tuple[str, int, int], int] = {}  # kind, stage or device, microbatch
        self.free = [0] * schedule.devices

    def add(self, device: int, tick: int, kind: str, chunk: int, microbatch: int) -> None:
        end = tick + self.schedule.duration(kind, device)
        where = self.schedule.stage(device, chunk) if kind in "FBW" else device
        self.passes.append(Pass(device, tick, kind, microbatch, chunk))
        self.end[kind, where, microbatch] = self.free[device] = end

    def done(self, kind: str, where: int, microbatch: int, tick: int) -> bool:
        return self.end.get((kind, where, microbatch), tick + 1) <= tick


def _greedy(schedule: Schedule) -> list[Pass]:
    """Tick by tick, each free device runs the first pass by PRIORITY whose inputs are there; it
    runs F no further ahead than its form allows, and one microbatch more for each barrier."""
    s, run, form = schedule, _Builder(schedule), schedule.form
    p, m, barriers = s.devices, s.microbatches, VOCABULARIES[s.vocab]
    queues: list[dict[str, list]] = []
    for device in range(p):
        forward, backward = (list(order) for order in form.order(p, device, m))
        weights = list(backward) if form.splits_backward else []
        queues.append({"F": forward, "B": backward, "W": weights})
        microbatches = [(0, microbatch) for microbatch in range(m if barriers else 0)]
        queues[-1] |= {"S": list(microbatches), "T": list(microbatches)}
    counts = [dict.fromkeys("FBW", 0) for _ in range(p)]

    def everywhere(kind, i, tick):
        return all(run.done(kind, device, i, tick) for device in range(p))

    def ready(device, kind, chunk, i, tick):
        stage, count = s.stage(device, chunk), counts[device]
        if kind == "F":
            limits = (limit + barriers * form.chunks for limit in form.max_in_flight(p, device, m))
            releases = (count["B"], count["W"] if form.splits_backward else count["B"])
            if any(count["F"] - n >= limit for n, limit in zip(releases, limits, strict=True)):
                return False
            return stage == 0 or run.done("F", stage - 1, i, tick)
        if kind == "B" and stage < s.last:
            return run.done("B", stage + 1, i, tick)
        if kind == "B" and barriers:
            return everywhere("S" if barriers == 1 else "T", i, tick)
        if kind == "T":
            return everywhere("S", i, tick)
        needed, where = {"B": ("F", stage), "W": ("B", stage), "S": ("F", s.last)}[kind]
        return run.done(needed, where, i, tick)

    tick, total = 0, sum(len(queue) for each in queues for queue in each.values())
    while len(run.passes) < total:
        for device in range(p):
            for kind in PRIORITY if run.free[device] <= tick else "":
                chunk, i = queues[device][kind][0] if queues[device][kind] else (0, -1)
                if i >= 0 and ready(device, kind, chunk, i, tick):
                    queues[device][kind].pop(0)
                    run.add(device, tick, kind, chunk, i)
                    counts[device][kind] = counts[device].get(kind, 0) + 1
                    break
        tick += 1
    return run.passes


def _interlaced(schedule: Schedule) -> list[Pass]:
    """1F1B around a V that all devices run together, as tensor parallelism would: in the window
    between two of them, even devices run F then B and odd ones B then F."""
    s, run, orders = schedule, _Builder(schedule), []
    forward, backward, vocabulary = (s.duration(kind, 0) for kind in "FBV")
    window = forward + backward
    starts, tick = {}, 0
    for kind, devices in (("F", range(s.devices)), ("V", [0]), ("B", reversed(range(s.devices)))):
        for device in devices:
            first = (kind == "F") == (device % 2 == 0)
            offset = 0 if first else window - s.duration(kind, device)
            offset = window if kind == "V" else offset
            tick += (offset - tick) % (window + vocabulary)
            starts[kind, device] = tick
            tick += s.duration(kind, device)
    for device in range(s.devices):
        offsets = {k: starts[k, 0 if k == "V" else device] for k in "FVB"}
        passes = [(offsets[k] + (window + vocabulary) * i, k, i) for k in "FVB"
                 for i in range(s.microbatches)]  # fmt: skip
        orders.append([(kind, i) for _, kind, i in sorted(passes)])
    while any(orders):
        for device in range(s.devices):
            kind, i = orders[device][0] if orders[device] else ("", 0)
            needs = {
                "F": ("F", device - 1, i), "V": ("F", s.last, i),
                "B": ("B", device + 1, i) if device < s.last else ("V", device, i),
            }.get(kind)  # fmt: skip
            first = kind == "F" and device == 0
            if needs is None or not (first or needs in run.end):
                continue
            together = range(s.devices) if kind == "V" else [device]
            if any(orders[d][:1] != [(kind, i)] for d in together):
                continue
            start = max(run.end.get(needs, 0), *(run.free[d] for d in (*together, device)))
            for d in together:
                orders[d].pop(0)
                run.add(d, start, kind, 0, i)
    return run.passes
