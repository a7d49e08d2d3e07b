"""Further heads in training: their loss, that they learn and the model is left without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lminf.errors import InputError
from lminf.models import spec
from lminf.models.extensible import module_of
from lminf.train import frozen
from lminf.train.multi_token import MTP_HEADS, MultiToken
from lminf.train.outer_layers import OuterLayers
from lminf.train.schedules import Constant
from tests.models import specs

SPEC = spec.llama(
    vocab_size=24, width=16, num_layers=3, num_heads=2, num_kv_heads=1, hidden_dim=24,
    trained_length=16, tied=True,
)  # fmt: skip
LOSS = MultiToken(OuterLayers(SPEC, 1), 2)
PARAMS = specs.parameters(SPEC)
TEXTS = np.random.default_rng(0).integers(0, 24, (2, 9)).astype(np.int32)
BATCH = {"tokens": jnp.asarray(TEXTS[:, :-1]), "targets": jnp.asarray(TEXTS[:, 1:])}


@pytest.mark.slow
def test_the_loss_is_that_of_every_head_on_every_token_it_has():
    """Text by text, token by token: head k after token t is asked for token t + 1 + k."""
    trained, rest = LOSS.split(PARAMS)
    own = np.asarray(PARAMS["embed"], np.float64)
    noise = np.random.default_rng(1).normal(0, 0.3, (2, *own.shape)).astype(np.float32)
    np.testing.assert_array_equal(trained[MTP_HEADS], np.stack([own, own]))  # as they start
    tables = [own, *(own + noise.astype(np.float64))]
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    hidden = module_of(SPEC).apply({"params": PARAMS}, BATCH["tokens"], positions=positions)[0]  # pyright: ignore
    expected = 0.0
    for k, table in enumerate(tables):
        nats = []
        for states, text in zip(np.asarray(hidden, np.float64), TEXTS, strict=True):
            for t in range(8):
                if t + 1 + k < len(text):
                    logits = table @ states[t]
                    nats.append(np.log(np.exp(logits).sum()) - logits[text[t + 1 + k]])
        assert len(nats) == 2 * (8 - k)
        expected += float(np.mean(nats))
    moved = {**trained, MTP_HEADS: trained[MTP_HEADS] + noise}
    np.testing.assert_allclose(jax.jit(LOSS)(moved, rest, BATCH), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_heads_learn_and_are_dropped():
    trained, rest = LOSS.split(PARAMS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        changed, losses = frozen.fit(
            lambda step: LOSS, trained, rest, lambda step: BATCH, optimizer=optax.adam(1.0),
            schedule=Constant(1e-2), steps=3,
        )  # fmt: skip
    assert losses[-1] < losses[0]
    changes = [np.abs(after - before).max() for after, before in
               zip(changed[MTP_HEADS], trained[MTP_HEADS], strict=True)]  # fmt: skip
    assert min(changes) > 0
    assert not np.array_equal(changed[MTP_HEADS][0], changed[MTP_HEADS][1])
    joined = LOSS.join(changed, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(dict(PARAMS))


def test_rows_too_short_for_the_furthest_head_are_refused():
    short = {name: x[:, :2] for name, x in BATCH.items()}
    with pytest.raises(InputError, match="rows of 2 tokens have none that lie 3 ahead"):
        LOSS(*LOSS.split(PARAMS), short)
