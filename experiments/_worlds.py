"""Models of a world, one for each seed, trained side by side; and what they make of its texts."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from lminf.attention import policy as policies
from lminf.config import parse_choice
from lminf.experiments import _training
from lminf.models import heads, spec
from lminf.objectives import terms
from lminf.parallel import mesh, partition
from lminf.run.progress import Progress
from lminf.train.batches import Batches
from lminf.train.ensemble import Replicas
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES
from lminf.train.step import REMAT, State, TrainStep
from lminf.types import Hidden, Params

MEASURED = 4096  # tokens of one forward pass


def replicas(c: ConfigDict, vocab_size: int) -> Replicas:
    """`c.replicates` models of the config's shape, on one device."""
    shape = spec.llama(vocab_size=vocab_size, trained_length=c.length, **c.model.to_dict())
    program = TrainStep(
        shape,
        (policies.FULL,) * shape.num_layers,
        mesh.make(mesh.MeshShape(), jax.devices()[:1]),
        partition.parse("data"),
        parse_choice(c.optimizer, OPTIMIZERS, what="optimizer").build(),
        learning_rate=lambda step: step,  # that of the replicas
        dtype=_training.DTYPES[_training.known(c.dtype, _training.DTYPES, "dtype")],
        remat=_training.known(c.remat, REMAT, "remat policy"),
        grad_accum_steps=c.grad_accum_steps,
        objective=terms.language_modeling(shape),
    )
    peak = parse_choice(c.schedule, SCHEDULES, what="schedule").peak
    return Replicas(program, tuple(range(c.seed, c.seed + c.replicates)), (peak,))


def train(
    c: ConfigDict, copies: Replicas, data: Sequence[Batches], *, every: int, label: str
) -> Iterator[tuple[int, State]]:
    """(steps, state) after every so many steps, and after the last."""
    state, schedule = copies.init(), parse_choice(c.schedule, SCHEDULES, what="schedule")
    with Progress(c.steps, label=label) as progress:
        for until in _training.boundaries(0, [c.steps], every):
            state, _ = copies.train(
                state, data, until=until, schedule=schedule, steps=c.steps,
                progress=progress.update,
            )  # fmt: skip
            progress.update(until)
            yield until, jax.tree.map(jnp.copy, state) if until < c.steps else state


def padded(
    documents: Sequence[Int[np.ndarray, " _"]],
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Tokens, targets, and which targets there are: a row for each document, which begins behind
    the end of another one (token 0).
    """
    sizes = np.array([len(document) for document in documents])
    is_token = np.arange(sizes.max()) < sizes[:, None]
    targets = np.zeros(is_token.shape, np.int32)
    targets[is_token] = np.concatenate(documents)
    return np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets, is_token


def hidden(
    program: TrainStep, params: Params, tokens: Int[Array, "B T"], **embeds: Hidden
) -> Hidden:
    """Final hidden states of rows of tokens, or of the embeddings in their place."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    states, _ = program.module.apply(
        {"params": params}, None if embeds else tokens, positions=positions, **embeds
    )  # pyright: ignore[reportGeneralTypeIssues]
    return states


def measure(
    copies: Replicas,
    params: Params,
    tokens: Int[np.ndarray, "S N T"],
    targets: Int[np.ndarray, "S N T"],
) -> tuple[Float[np.ndarray, "S N T"], Bool[np.ndarray, "S N T"]]:
    """(nats of each target, whether it is the likeliest token): of model s, of its own rows."""
    count, length = tokens.shape[1:]
    rows = min(count, max(1, MEASURED // length))
    parts = []
    for start in range(0, count, rows):
        batch = np.arange(start, start + rows) % count  # one shape, so one program
        parts.append(_measured(copies.program, params, tokens[:, batch], targets[:, batch]))
    nll, best = (np.concatenate(part, 1)[:, :count] for part in zip(*parts, strict=True))
    return nll, best


@partial(jax.jit, static_argnums=0)
def _measured(program: TrainStep, params, tokens, targets):
    def one(params, tokens, targets):
        logits = heads.lm(program.spec, params, hidden(program, params, tokens))
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - chosen, logits.argmax(-1) == targets

    return jax.vmap(one)(params, tokens, targets)


def one_peak(state: State) -> Params:
    """Parameters [seeds, ...] of replicas that have one learning rate."""
    return jax.tree.map(lambda leaf: leaf[:, 0], state.params)


def over_seeds(values: list[float]) -> str | None:
    """`mean (least–largest)`."""
    if not values:
        return None
    return f"{np.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"
