"""Heads are functions of hidden states: pooled vectors, and probes that learn from them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policy import FULL
from lminf.models import decoder, heads
from lminf.objectives import cross_entropy
from lminf.parallel import mesh, partition
from lminf.parallel.loss import token_loss
from tests.attention import cases
from tests.models import specs

WIDTH = specs.LLAMA.width


@pytest.fixture(scope="module")
def hidden():
    return np.random.default_rng(0).normal(size=(3, 6, WIDTH)).astype(np.float32)


def test_pooling_reads_the_tokens_of_its_mask_alone(hidden):
    mask = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    mean, last = cases.compiled(
        lambda x: (heads.embed(x, mask), heads.embed(x, mask, pooling="last"))
    )(hidden)
    np.testing.assert_allclose(mean[0], hidden[0, 2:].mean(0), atol=1e-6)
    np.testing.assert_allclose(mean[1], hidden[1, :3].mean(0), atol=1e-6)
    np.testing.assert_array_equal(last[:2], hidden[[0, 1], [5, 2]])
    assert not mean[2].any()
    assert not last[2].any()


def test_pooling_sums_in_float32(hidden):
    short = hidden.astype(jnp.bfloat16)
    pooled = cases.compiled(lambda x: heads.embed(x, jnp.ones((3, 6), bool)))(short)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, short.astype(np.float32).mean(1), atol=1e-6)


LOGITS = {
    "scale": {"logit_scale": 0.25},
    "scale and bias": {"logit_scale": 0.25, "head_bias": True},
    "scale, cap": {"logit_scale": 3.0, "final_soft_cap": 2.0},
    "cap and bias": {"final_soft_cap": 2.0, "head_bias": True},
}


@pytest.mark.parametrize("name", LOGITS)
def test_losses_are_of_the_logits_that_are_sampled(name, hidden):
    """Granite and Cohere scale their logits, Gemma caps them, GPT-J adds a bias."""
    shape = specs.change(specs.LLAMA, **LOGITS[name])
    rng = np.random.default_rng(1)
    params = {
        "head": rng.normal(size=(shape.vocab_size, WIDTH)).astype(np.float32),
        "embed": np.zeros((shape.vocab_size, WIDTH), np.float32),
        "head_bias": rng.normal(size=shape.vocab_size).astype(np.float32),
    }
    targets = rng.integers(0, shape.vocab_size, hidden.shape[:2]).astype(np.int32)
    z = hidden.astype(np.float64) @ params["head"].T.astype(np.float64) * shape.logit_scale
    z = z + (params["head_bias"] if shape.head_bias else 0)
    if shape.final_soft_cap:
        z = shape.final_soft_cap * np.tanh(z / shape.final_soft_cap)
    expected = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], 2)[..., 0]
    np.testing.assert_allclose(
        cases.compiled(partial(heads.lm, shape))(params, hidden), z, atol=1e-4
    )
    nll = cases.compiled(partial(cross_entropy.token_nll, shape))(params, hidden, targets)
    np.testing.assert_allclose(nll, expected, atol=1e-4)
    place = {"mesh": mesh.single(), "strategy": partition.STRATEGIES["data"]}
    trained = cases.compiled(partial(token_loss, shape, **place))(params, hidden, targets)
    np.testing.assert_allclose(trained.nll, expected, atol=1e-4)


# Each probe: its initial parameters, its loss, and how well it does on tokens it did not see.


def scalar_loss(params, hidden, labels):
    return jnp.square(heads.scalar(params, hidden) - jnp.where(labels == 1, 1.0, -1.0)).mean()


def tags_loss(params, hidden, labels):
    chosen = jnp.take_along_axis(heads.tags(params, hidden), labels[..., None], axis=-1)
    return (jax.nn.logsumexp(heads.tags(params, hidden), axis=-1) - chosen[..., 0]).mean()


PROBES = {
    "scalar": (
        heads.init_scalar(WIDTH, key=jax.random.key(1)), scalar_loss,
        lambda params, hidden: heads.scalar(params, hidden) > 0,
    ),
    "tags": (
        heads.init_tags(WIDTH, 2, key=jax.random.key(1)), tags_loss,
        lambda params, hidden: heads.tags(params, hidden).argmax(-1) == 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def frozen():
    """Hidden states of random tokens, and whether each token is of the vocabulary's upper half."""
    spec = specs.shallow(specs.LLAMA, 1)
    tokens = jax.random.randint(jax.random.key(2), (2, 64), 0, spec.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), tokens.shape)
    module, params = decoder.Decoder(spec, (FULL,)), specs.parameters(spec)
    # Embeddings of the two halves lie apart along one direction.
    apart = jnp.where(jnp.arange(spec.vocab_size) < spec.vocab_size // 2, -1.0, 1.0)
    params = params | {"embed": params["embed"] + 0.5 * apart[:, None]}
    run = cases.compiled(lambda p: module.apply({"params": p}, tokens, positions=positions)[0])
    return run(params), (tokens >= spec.vocab_size // 2).astype(jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_linear_probe_of_frozen_hidden_states_learns_in_a_few_steps(name, frozen):
    (hidden, labels), (params, loss, predict) = frozen, PROBES[name]

    @cases.compiled
    def step(params):
        value, gradient = jax.value_and_grad(loss)(params, hidden[:1], labels[:1])
        return jax.tree.map(lambda p, g: p - 0.03 * g, params, gradient), value

    losses = []
    for _ in range(60):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    right = (predict(params, hidden[1:]) == labels[1:].astype(bool)).mean()
    assert float(right) > 0.9
