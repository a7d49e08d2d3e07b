"""Adapters: nothing at first, what they say when merged, and only they learn."""

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.surgery.lora import LoRA
from tests.train import making


@pytest.fixture
def adapters():
    return LoRA(rank=2, alpha=6.0, targets=("wq", "wo")).init(
        making.params(), key=jax.random.key(0)
    )


def test_fresh_adapters_change_nothing(adapters):
    merged = LoRA(rank=2).merge(making.params(), adapters)
    assert making.largest_difference(merged, making.params()) == 0


def test_a_merged_matrix_is_the_sum_that_the_paper_writes(adapters):
    lora = LoRA(rank=2, alpha=6.0)
    pair = adapters["layers"]["attention"]["wo"]
    pair["b"] = np.ones(pair["b"].shape, np.float32)
    merged = lora.merge(making.params(), adapters)["layers"]["attention"]
    before = making.params()["layers"]["attention"]
    layers, heads, head_dim, width = before["wo"].shape
    added = 3.0 * np.einsum("lir,lro->lio", pair["a"], pair["b"])
    np.testing.assert_allclose(
        merged["wo"], before["wo"] + added.reshape(layers, heads, head_dim, width), rtol=1e-5
    )
    np.testing.assert_array_equal(merged["wq"], before["wq"])


def test_what_cannot_be_adapted_is_named():
    with pytest.raises(InputError, match="targets among wq, wk"):
        LoRA(targets=("wz",))


@pytest.mark.slow
def test_only_adapters_learn_and_a_mesh_changes_nothing():
    settings = {"lora": LoRA(rank=4), "learning_rate": lambda step: np.float32(1e-2)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = making.program(**settings)
        state, losses = making.train(made, steps=6, batch_of=lambda _: making.tokens())
        sliced = making.program(strategy="zero3", fsdp=4, data=2, **settings)
        _, others = making.train(sliced, steps=6, batch_of=lambda _: making.tokens())
        finished = made.finished(state)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(others, losses, atol=1e-4)
    assert making.largest_difference(state.frozen, making.params()) == 0
    assert making.largest_difference(finished["embed"], making.params()["embed"]) == 0
    assert making.largest_difference(finished["layers"], making.params()["layers"]) > 1e-3
