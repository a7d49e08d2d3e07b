"""Training beside a frozen model: what earlier chunks say reaches a model that cannot read them.

A row is a letter eight times, a mark, and the letter again. In a chunk that begins with the mark
nothing tells the letter, so without a past no model has less than the entropy of letters there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import decoder
from lminf.models.extensible import ExtensibleTokenizer, TwoStream, module_of, token_nll
from lminf.models.longmem import LongMem, SideNetwork
from lminf.train import frozen as training
from lminf.train.optim import AdamW
from lminf.train.schedules import Constant
from tests.models import specs

LETTERS, CHUNK = 11, 8
SPEC = specs.change(
    specs.shallow(specs.LLAMA, 2), vocab_size=LETTERS + 1, width=32, tied=True, trained_length=16
)
ENTROPY = np.log(LETTERS)  # nats


def rows(step):
    letters = np.random.default_rng(step).integers(0, LETTERS, (16, 1))
    tokens = np.tile(letters, (1, 2 * CHUNK)).astype(np.int32)
    tokens[:, CHUNK] = LETTERS
    return {"tokens": tokens}


def fit(loss_at, params, frozen, steps):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        return training.fit(
            loss_at, params, frozen, rows,
            optimizer=AdamW().build(), schedule=Constant(1e-2), steps=steps,
        )  # fmt: skip


def pretraining(params, frozen, batch):
    tokens = batch["tokens"]
    positions = jnp.broadcast_to(jnp.arange(2 * CHUNK, dtype=jnp.int32), tokens.shape)
    hidden = module_of(SPEC).apply({"params": params}, tokens, positions=positions)[0]
    return token_nll(SPEC, params, hidden[:, :-1], tokens[:, 1:]).mean()


@pytest.fixture(scope="module")
def model():
    """A model that writes the letter before the mark again."""
    params = decoder.init(SPEC, key=jax.random.key(0))
    params, losses = fit(lambda step: pretraining, params, {}, steps=80)
    assert losses[-1] < 0.3  # the first letter is not to be known: its part of 15 is 0
    return params


def assert_untouched(model, before):
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


@pytest.mark.slow
def test_a_compressed_past_tells_what_no_chunk_does_and_the_model_stays_bit_for_bit(model):
    before = jax.tree.map(np.array, model)
    tokenizer = ExtensibleTokenizer(SPEC, layers=1, chunk=CHUNK)
    params, losses = fit(
        lambda step: TwoStream(tokenizer, (2, 4)[step % 2]), tokenizer.init(model), model, 80
    )
    assert_untouched(model, before)
    assert losses[-1] < losses[0]
    tokens = jnp.asarray(rows(10_000)["tokens"])
    for ratio in (2, 4, 8):  # the last one was not trained
        after_mark = tokenizer.nll(params, model, tokens, ratio)[:, 1].mean()
        assert after_mark < ENTROPY - 0.5, ratio


@pytest.mark.slow
def test_a_bank_tells_what_no_segment_does_and_the_model_stays_bit_for_bit(model):
    before = jax.tree.map(np.array, model)
    longmem = LongMem(SPEC, memory_layer=1, capacity=CHUNK, retrieved=4, chunk=2)
    side, losses = fit(
        lambda step: SideNetwork(longmem, CHUNK), longmem.init(model), model, steps=80
    )
    assert_untouched(model, before)
    assert losses[-1] < losses[0]
    tokens = jnp.asarray(rows(10_000)["tokens"])
    after_mark = longmem.nll(side, model, tokens, CHUNK)[:, CHUNK].mean()
    forgotten = longmem.nll(side, model, tokens, CHUNK, remember=False)[:, CHUNK].mean()
    assert after_mark < ENTROPY - 0.5 < forgotten


def test_a_loss_that_is_not_finite_is_refused():
    def loss(params, frozen, batch):
        return (params["x"] * jnp.where(batch["step"] == 1, jnp.nan, 1.0)).sum()

    with pytest.raises(InputError, match="the loss of step 1 is nan; lower the learning rate"):
        training.fit(
            lambda step: loss, {"x": jnp.ones(2)}, {}, lambda step: {"step": jnp.int32(step)},
            optimizer=AdamW().build(), schedule=Constant(1e-2), steps=3,
        )  # fmt: skip
