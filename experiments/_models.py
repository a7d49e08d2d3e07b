"""The model of an experiment: a named checkpoint, or the tiny one that is trained on the spot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lminf.attention.policy import FULL
from lminf.data.sources import text_of
from lminf.data.tokenizers import ByteTokenizer
from lminf.data.windows import RandomWindows
from lminf.errors import InputError
from lminf.lm.lm import DTYPES, LM
from lminf.models import spec
from lminf.parallel import mesh, partition
from lminf.run.progress import Progress
from lminf.train import batches
from lminf.train.loop import fit
from lminf.train.optim import AdamW
from lminf.train.schedules import Cosine
from lminf.train.step import TrainStep

TINY = "tiny"
# A byte model that learns to spell in under a minute on two cores, at 64 bytes of context.
TINY_LENGTH, TINY_STEPS, TINY_BATCH, TINY_RATE = 64, 200, 32, 3e-3


def load(name: str, *, seed: int, dtype: str = "float32") -> LM:
    """The model, attending in full. `tiny` is trained here, on the default text."""
    if dtype not in DTYPES:
        raise InputError(f"--config.dtype={dtype}: choose one of {', '.join(DTYPES)}")
    if name == TINY:
        trained = train_tiny(seed=seed)
        params = jax.tree.map(lambda array: array.astype(dtype), trained.params)
        return dataclasses.replace(trained, params=params, dtype=jnp.dtype(dtype))
    with Progress(1, label=f"loading {name}", unit="tensors") as progress:
        lm = LM.from_pretrained(
            name, policy=FULL, dtype=jnp.dtype(dtype), progress=_showing(progress)
        )
    return lm.with_devices(jax.local_devices())


def check_length(length: int) -> None:
    """Before a model is loaded, or trained, to read so many tokens."""
    if length < 2:
        raise InputError(f"--config.length={length}: give at least 2 tokens")


def train_tiny(*, seed: int) -> LM:
    """A 4-layer byte-level Llama shape, trained at 64 tokens on the interpreter's documentation."""
    tokenizer = ByteTokenizer()
    shape = spec.llama(
        vocab_size=tokenizer.vocab_size, width=128, num_layers=4, num_heads=4, num_kv_heads=2,
        hidden_dim=384, trained_length=TINY_LENGTH,
    )  # fmt: skip
    schedule = Cosine(TINY_RATE, 1e-4, warmup=20)
    program = TrainStep(
        shape,
        LM(shape, {}, tokenizer).decoder.policies,
        mesh.single(),
        partition.STRATEGIES["data"],
        AdamW(b2=0.999, weight_decay=1e-4).build(),
        lambda step: schedule(step, TINY_STEPS),
    )
    tokens = np.asarray(tokenizer.encode(text_of(None)))
    windows = RandomWindows(tokens, length=TINY_LENGTH, rows=TINY_BATCH, seed=seed)
    with Progress(TINY_STEPS, label="training the tiny model") as progress:
        state = fit(
            program.step,
            program.init(key=jax.random.key(seed)),
            lambda step: batches.put(
                windows.batch(step), mesh=program.mesh, strategy=program.strategy
            ),
            steps=TINY_STEPS,
            watch=lambda done, metrics: progress.update(done, loss=float(metrics.loss)),
        )
    return LM(shape, jax.tree.map(np.asarray, state.params), tokenizer)


def _showing(progress: Progress):
    def show(done: int, of: int) -> None:
        progress.total = of
        progress.update(done)

    return show
