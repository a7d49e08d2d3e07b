"""Training outer layers: the loss is that of the whole model, and the layers between stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lminf.errors import InputError
from lminf.models import heads, spec
from lminf.models.extensible import module_of
from lminf.train import frozen
from lminf.train.outer_layers import OuterLayers
from lminf.train.schedules import Constant
from tests.models import specs

SPEC = spec.llama(
    vocab_size=24, width=16, num_layers=5, num_heads=2, num_kv_heads=1, hidden_dim=24,
    trained_length=16, tied=False,
)  # fmt: skip
LOSS = OuterLayers(SPEC, 2)
PARAMS = specs.parameters(SPEC)
ROWS = np.random.default_rng(0).integers(0, 24, (2, 9)).astype(np.int32)
BATCH = {"tokens": jnp.asarray(ROWS[:, :-1]), "targets": jnp.asarray(ROWS[:, 1:])}


@pytest.mark.slow
def test_what_is_split_joins_again():
    trained, rest = LOSS.split(PARAMS)
    assert set(trained) == {"embed", "head", "layers"}
    np.testing.assert_array_equal(
        rest["layers"]["mlp"]["w_up"], PARAMS["layers"]["mlp"]["w_up"][2:3]
    )
    jax.tree.map(np.testing.assert_array_equal, dict(LOSS.join(trained, rest)), dict(PARAMS))


@pytest.mark.slow
def test_the_loss_is_that_of_the_whole_model():
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    hidden = module_of(SPEC).apply({"params": PARAMS}, BATCH["tokens"], positions=positions)[0]  # pyright: ignore
    logits = np.asarray(heads.lm(SPEC, PARAMS, hidden), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, ROWS[:, 1:, None], -1).mean()
    np.testing.assert_allclose(jax.jit(LOSS)(*LOSS.split(PARAMS), BATCH), expected, rtol=1e-5)


@pytest.mark.slow
def test_only_outer_layers_and_tables_change():
    trained, rest = LOSS.split(PARAMS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        changed, losses = frozen.fit(
            lambda step: LOSS, trained, rest, lambda step: BATCH, optimizer=optax.adam(1.0),
            schedule=Constant(1e-2), steps=3,
        )  # fmt: skip
    assert losses[-1] < losses[0]
    joined = LOSS.join(changed, rest)
    for name, after in jax.tree_util.tree_leaves_with_path(joined):
        before = dict(jax.tree_util.tree_leaves_with_path(dict(PARAMS)))[name]
        if name[0].key != "layers":
            kept = name[0].key == "final_norm"
            assert np.array_equal(before, after) == kept
            continue
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [False, False, True, False, False], name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OuterLayers(SPEC, 3), "3 layers at either end of a model of 5 leave none between"),
        (lambda: dataclasses.replace(LOSS, spec=specs.GEMMA), "gemma2's layers differ or have le"),
        (lambda: dataclasses.replace(LOSS, layers=0), r"OuterLayers\.layers is 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
