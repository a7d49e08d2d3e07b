"""Times training steps of one shape, and a torch process doing the same in turn."""

import json
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.errors import InputError
from lminf.experiments._main import main
from lminf.kernels.common import bench
from lminf.models import cost, spec
from lminf.parallel import mesh, partition
from lminf.run import memory, plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import batches, planning
from lminf.train.optim import AdamW
from lminf.train.step import TrainStep

PEER = Path(__file__).resolve().parent.parent / "benchmarks" / "peer_torch_training.py"


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses a peer that cannot be started."""
    if c.peer and shutil.which(c.peer) is None:
        raise InputError(f"--config.peer={c.peer} is no program; give a Python with torch")


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    memory.keep_pages()
    ours = Timed(c, c.model)
    facts = {"parameters": cost.parameters(ours.program.spec), "batch": c.data.batch,
             "length": c.data.length}  # fmt: skip
    with Progress(c.rounds, label="timing", unit="rounds") as progress:
        for turn in range(c.rounds):
            yield {"part": "speed", **facts, "side": "lminf", "round": turn, **ours.speed(c.steps)}
            if c.peer:
                yield {"part": "speed", **facts, "side": "torch", "round": turn, **peer(c)}
            progress.update(turn + 1)
    yield {"part": "ceiling", **ceiling(ours.program, c.data.length)}
    small = Timed(c, c.small)
    yield {"part": "dispatch", "parameters": cost.parameters(small.program.spec),
           "dispatch_share": small.dispatch(c.steps)}  # fmt: skip
    for vocab_size in (4096, 16384, 65536):
        yield {"part": "loss memory", "vocab_size": vocab_size,
               "loss_bytes": loss_bytes(c, vocab_size)}  # fmt: skip


class Timed:
    """A program on all devices, a CPU's cores among them, with a batch of noise."""

    def __init__(self, c, model):
        everywhere = mesh.make(mesh.MeshShape(), jax.local_devices())
        self.program = program(model, c.data.vocab_size, c.data.length, everywhere)
        rng = np.random.default_rng(c.seed)
        size = (c.data.batch, c.data.length + 1)
        self.noise = rng.integers(0, c.data.vocab_size, size).astype(np.int32)
        self.tokens = c.data.batch * c.data.length
        self.state = self.program.init(key=jax.random.key(c.seed))
        self.step()

    def batch(self) -> dict[str, jax.Array]:
        noise = {"tokens": self.noise[:, :-1], "targets": self.noise[:, 1:]}
        return batches.put(noise, mesh=self.program.mesh, strategy=self.program.strategy)

    def step(self) -> float:
        self.state, metrics = self.program.step(self.state, self.batch())
        return float(metrics.loss)

    def speed(self, steps: int) -> dict[str, float]:
        self.step()
        started = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        seconds = (time.perf_counter() - started) / steps
        return {"seconds": seconds, "tokens_per_second": self.tokens / seconds, "loss": loss}

    def dispatch(self, steps: int) -> float:
        """Share of a step's time in which Python's thread works.

        Its processor time, because on a CPU a step begins while its call is still returning, and
        then takes the cores from it.
        """
        seconds = self.speed(steps)["seconds"]
        spent = []
        for _ in range(max(steps, 20)):
            jax.block_until_ready(self.state)
            started = time.thread_time()
            self.state, _ = self.program.step(self.state, self.batch())
            spent.append(time.thread_time() - started)
        return float(np.median(spent) / seconds)


def ceiling(timed: TrainStep, length: int) -> dict[str, float]:
    """Tokens/s if a step did nothing but its products, at the rate of a large one."""
    flops = planning.flops_per_token(timed, length)
    rate = bench.gemm_tflops(np.float32, 2048) * 1e12
    return {"flops_per_token": flops, "flops_per_second": rate, "tokens_per_second": rate / flops}


def program(model: ConfigDict, vocab_size: int, length: int, laid_out: Mesh) -> TrainStep:
    shape = spec.llama(vocab_size=vocab_size, trained_length=length, **model.to_dict())
    return TrainStep(
        shape, (policies.FULL,) * shape.num_layers, laid_out, partition.STRATEGIES["data"],
        AdamW().build(), lambda step: np.float32(1e-4),
    )  # fmt: skip


def loss_bytes(c: ConfigDict, vocab_size: int) -> int:
    """Temporary bytes of loss and gradient, beyond the gradient of the embedding itself."""
    small = program(c.small, vocab_size, c.data.length, mesh.single())
    shapes = {
        name: jax.ShapeDtypeStruct((c.data.batch, c.data.length), np.int32)
        for name in ("tokens", "targets")
    }
    compiled = jax.jit(small.gradients).lower(small.shapes.params, shapes).compile()
    table = vocab_size * small.spec.width * 4
    return max(compiled.memory_analysis().temp_size_in_bytes - table, 0)


def peer(c: ConfigDict) -> Row:
    """The same steps by torch, in a process of its own."""
    model = {**c.model.to_dict(), **c.data.to_dict(), "steps": c.steps, "seed": c.seed}
    done = subprocess.run(
        [c.peer, str(PEER), json.dumps(model)], capture_output=True, text=True, check=False
    )
    try:
        if done.returncode:
            raise ValueError(done.stderr.strip().rpartition("\n")[2] or f"rc {done.returncode}")
        return json.loads(done.stdout)
    except ValueError as error:
        raise InputError(
            f"{c.peer} cannot run {PEER.name} ({error}); give a Python with torch"
        ) from error


def table(rows: list[Row]) -> list[Row]:
    """Medians over the rounds, and how many times torch's speed."""
    by_side = {}
    for row in rows:
        if row["part"] == "speed":
            by_side.setdefault(row["side"], []).append(row["tokens_per_second"])
    medians = {side: float(np.median(speeds)) for side, speeds in by_side.items()}
    shown = [{"measured": f"{side} tokens/s", "value": round(value)}
             for side, value in medians.items()]  # fmt: skip
    if "torch" in medians:
        shown.append({"measured": "lminf / torch", "value": medians["lminf"] / medians["torch"]})
    for row in rows:
        if row["part"] == "ceiling":
            shown.append({"measured": "tokens/s of the products alone, at XLA's rate",
                          "value": round(row["tokens_per_second"])})  # fmt: skip
        if row["part"] == "dispatch":
            shown.append({"measured": "dispatch share of a step, 1M parameters",
                          "value": row["dispatch_share"]})  # fmt: skip
        if row["part"] == "loss memory":
            shown.append({"measured": f"temporary bytes, vocabulary {row['vocab_size']:,}",
                          "value": row["loss_bytes"]})  # fmt: skip
    return shown


def plot(rows: list[Row]) -> Figure:
    """The median speed of each side, and its rounds as dots."""
    speeds = [row for row in rows if row["part"] == "speed"]
    return plots.bars(speeds, x="side", y="tokens_per_second",
                      x_label="", y_label="training speed (tokens/s)")  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, check=check)
