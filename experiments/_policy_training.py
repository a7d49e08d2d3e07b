"""A model in training under one policy, as a value that experiments step, fit and read with."""

import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from lminf.attention.policy import AnyPolicy
from lminf.config import parse_choice
from lminf.data import windows
from lminf.data.tokenizers import ByteTokenizer
from lminf.models import layer_policies, spec
from lminf.parallel import mesh, partition
from lminf.run.progress import Progress
from lminf.train import batches
from lminf.train.loop import fit
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.step import State, TrainStep


def program(c: ConfigDict, policy: AnyPolicy) -> TrainStep:
    """The step of a byte model of the config's shape in float32, on all devices."""
    shape = spec.llama(
        vocab_size=ByteTokenizer().vocab_size, trained_length=c.length, **c.model.to_dict()
    )
    schedule = parse_choice(c.schedule, SCHEDULES, what="schedule")
    return TrainStep(
        shape,
        layer_policies.by_layer(policy, windows=shape.windows, num_kv_heads=shape.num_kv_heads),
        mesh.make(mesh.MeshShape(), jax.local_devices()),
        partition.STRATEGIES["data"],
        parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
        lambda step: schedule(step, c.steps),
    )


class Training:
    """A model in training: models of one seed start from the same parameters."""

    def __init__(self, program: TrainStep, data: windows.RandomWindows, *, seed: int) -> None:
        self.program, self.data = program, data
        self.state: State = program.init(key=jax.random.key(seed))

    def put(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
        return batches.put(batch, mesh=self.program.mesh, strategy=self.program.strategy)

    def fit(self, steps: int, progress: Progress) -> None:
        """Trains until so many steps are done."""
        self.state = fit(
            self.program.step,
            self.state,
            lambda step: self.put(self.data.batch(step)),
            steps=steps,
            watch=lambda done, metrics: progress.update(done, loss=float(metrics.loss)),
        )

    def step(self) -> float:
        """Seconds of one more step."""
        batch = self.put(self.data.batch(int(self.state.step)))
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.program.step(self.state, batch))
        return time.perf_counter() - started

    def nll(
        self, measured: Sequence[Mapping[str, np.ndarray]], reader: TrainStep | None = None
    ) -> np.ndarray:
        """[rows, T], nats; `reader` is a step of the same parameters that attends otherwise."""
        program = reader or self.program
        return np.concatenate(
            [np.asarray(program.nll(self.state, self.put(batch))) for batch in measured]
        )


def quartiles(trainings: Sequence[Training], rounds: int) -> np.ndarray:
    """[trainings, 3] seconds of a step: a step of each in turns, so that other work on the machine
    slows all of them alike.
    """
    each = [[training.step() for training in trainings] for _ in range(rounds + 1)]
    return np.percentile(each[1:], [25, 50, 75], axis=0).T  # the first of each compiles
