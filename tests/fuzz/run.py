"""Damaged inputs read in processes of their own, each with a limit of time and of memory."""

import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType

from lminf.errors import InputError
from tests.fuzz import mutate, targets

SECONDS = 20.0  # the most that one input may take, of a processor
# The most by the clock: as many of a machine that does other things, or of one that waits for ever.
WAITING_SECONDS = 10 * SECONDS
# The imports of a process and what its target compiles, on a machine that does other things.
START_SECONDS = 900.0
GROWTH = 1 << 30  # bytes: the most that one input may add to the process
# Beyond this an allocation fails instead of taking the machine's memory: twice what is a failure.
ADDRESS_SPACE = 2 * GROWTH
READY = "ready"


@dataclass(frozen=True)
class Failure:
    """An input that was neither read nor refused."""

    target: str
    number: int
    text: str


def names() -> list[str]:
    """The targets there are."""
    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def load(target: str) -> ModuleType:
    return importlib.import_module(f"tests.fuzz.targets.{target}")


def share(target: str, inputs: int) -> int:
    """How many of so many inputs the target is given."""
    return max(1, inputs // getattr(load(target), "COST", 1))


def damaged(module: ModuleType, seeds: Path, number: int, *, seed: int, folder: Path) -> Path:
    """Copies one of the valid inputs into `folder` and damages it; the same for the same number."""
    rng = random.Random(f"{seed}-{module.__name__}-{number}")
    chosen = rng.choice(sorted(seeds.iterdir()))
    path = folder / chosen.name
    copy = shutil.copytree if chosen.is_dir() else shutil.copy
    copy(chosen, path)
    getattr(module, "mutate", mutate.mutate)(rng, path)
    return path


def attempt(module: ModuleType, seeds: Path, number: int, *, seed: int) -> str | None:
    """Reads one damaged input; the traceback if it was neither read nor refused."""
    with tempfile.TemporaryDirectory(prefix="lminf-fuzz-") as folder:
        path = damaged(module, seeds, number, seed=seed, folder=Path(folder))
        before = _peak_bytes(reset=True)
        try:
            module.read(path)
        except InputError:
            pass
        except BaseException:  # a panic of Rust is no Exception
            return traceback.format_exc()
        growth = _peak_bytes() - before
        return f"grew by {growth / 2**20:.0f} MiB" if growth > GROWTH else None


def fuzz(target: str, *, inputs: int, seed: int, workers: int = 2) -> Iterator[Failure]:
    """Failures among that many damaged inputs, each found in one of `workers` processes."""
    context = multiprocessing.get_context("spawn")
    numbers = iter(range(inputs))
    with tempfile.TemporaryDirectory(prefix="lminf-fuzz-seeds-") as seeds:
        load(target).seeds(Path(seeds))
        running: dict[Connection, _Worker] = {}
        for _ in range(min(workers, inputs)):
            worker = _Worker(context, target, Path(seeds), seed)
            running[worker.connection] = worker
            worker.give(next(numbers))
        while running:
            ready = wait(list(running), timeout=1.0)
            late = [c for c, w in running.items() if c not in ready and w.late()]
            for connection in [*ready, *late]:
                worker = running[connection]
                if connection in ready and worker.starts():
                    continue
                del running[connection]
                failure = worker.result(late=connection in late)
                if failure is not None:
                    yield Failure(target, worker.number, failure)
                number = next(numbers, None)
                if number is None:
                    worker.stop()
                    continue
                if not worker.process.is_alive():
                    worker = _Worker(context, target, Path(seeds), seed)
                running[worker.connection] = worker
                worker.give(number)


class _Worker:
    """A process that reads one damaged input after another."""

    def __init__(self, context, target: str, seeds: Path, seed: int):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, target, seeds, seed), daemon=True
        )
        self.process.start()
        theirs.close()
        self.number, self.since, self.spent = -1, time.monotonic(), 0.0
        self.started = False

    def give(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        self.spent = _processor_seconds(self.process.pid)
        self.connection.send(number)

    def starts(self) -> bool:
        """Whether what it sent says only that it is ready: from now on its input is timed."""
        if self.started:
            return False
        with contextlib.suppress(EOFError):
            self.started = self.connection.recv() == READY
        self.since, self.spent = time.monotonic(), _processor_seconds(self.process.pid)
        return self.started

    def late(self) -> bool:
        waited = time.monotonic() - self.since
        if not self.started:
            return waited > START_SECONDS
        busy = _processor_seconds(self.process.pid) - self.spent
        return waited > WAITING_SECONDS or (waited > SECONDS and busy > SECONDS)

    def result(self, *, late: bool) -> str | None:
        if late:
            self.process.kill()
            self.process.join()
            return f"no answer in {time.monotonic() - self.since:.0f} s"
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f"the process died with status {self.process.exitcode}"

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(timeout=10)


def _work(connection: Connection, target: str, seeds: Path, seed: int) -> None:
    module = load(target)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    size = _virtual_bytes()
    if size is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * ADDRESS_SPACE, resource.RLIM_INFINITY))
    getattr(module, "prepare", lambda: None)()
    connection.send(READY)
    while (number := connection.recv()) is not None:
        connection.send(attempt(module, seeds, number, seed=seed))


def _peak_bytes(*, reset: bool = False) -> int:
    """The most memory this process has held, since the last reset where the system can do that."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor_seconds(process: int | None) -> float:
    """That the process has used; the clock's where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _virtual_bytes() -> int | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
