"""The model of an experiment: a named checkpoint, or the tiny one that is trained on the spot."""

import jax
import numpy as np
import optax

from lminf.data.sources import text_of
from lminf.data.tokenizers import ByteTokenizer
from lminf.data.windows import random_windows
from lminf.lm import LM
from lminf.models import decoder, spec
from lminf.run.progress import Progress
from lminf.train import loop, step

TINY = "tiny"
# A byte model that learns to spell in under a minute on two cores, at 64 bytes of context.
TINY_LENGTH, TINY_STEPS, TINY_BATCH, TINY_RATE = 64, 200, 32, 3e-3


def load(name: str, *, seed: int) -> LM:
    """The model, attending in full. `tiny` is trained here, on the default text."""
    if name == TINY:
        return train_tiny(seed=seed)
    with Progress(1, label=f"loading {name}", unit="tensors") as progress:
        lm = LM.from_pretrained(name, progress=_showing(progress))
    return lm.with_devices(jax.local_devices())


def train_tiny(*, seed: int) -> LM:
    """A 4-layer byte-level Llama shape, trained at 64 tokens on the interpreter's documentation."""
    tokenizer = ByteTokenizer()
    shape = spec.llama(
        vocab_size=tokenizer.vocab_size, width=128, num_layers=4, num_heads=4, num_kv_heads=2,
        hidden_dim=384, trained_length=TINY_LENGTH,
    )  # fmt: skip
    by_layer = LM(shape, {}, tokenizer).decoder.policies
    module = decoder.Decoder(shape, by_layer)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, TINY_RATE, 20, TINY_STEPS, 1e-4)),
    )
    tokens = np.asarray(tokenizer.encode(text_of(None)))
    batches = random_windows(tokens, length=TINY_LENGTH, batch=TINY_BATCH, seed=seed)
    state = step.start(decoder.init(shape, key=jax.random.key(seed)), optimizer)
    with Progress(TINY_STEPS, label="training the tiny model") as progress:
        state = loop.fit(
            step.make_step(module, optimizer), state, batches, steps=TINY_STEPS,
            watch=lambda done, loss: progress.update(done, loss=loss),
        )  # fmt: skip
    return LM(shape, state.params, tokenizer)


def _showing(progress: Progress):
    def show(done: int, of: int) -> None:
        progress.total = of
        progress.update(done)

    return show
