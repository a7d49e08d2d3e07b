"""The loss of a divided vocabulary, and its gradients, beside the dense ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lminf.parallel import mesh, vocabulary

N, D, VOCAB = 6, 8, 21  # no multiple of the devices: the last one has rows that are none


def dense(hidden, rows, labels, weight, *, z_loss, soft_cap):
    """What is minimised, by the definition of the loss."""
    logits = hidden @ rows.T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.scipy.special.logsumexp(logits, axis=1)
    return (weight * (lse - logits[jnp.arange(N), labels] + z_loss * lse**2)).sum()


def divided(hidden, rows, labels, weight, *, barriers, z_loss, soft_cap):
    first = jax.lax.axis_index("stage") * rows.shape[0]
    local = vocabulary.softmax_pass(
        hidden, rows, labels, first=first, vocab_size=VOCAB, soft_cap=soft_cap, barriers=barriers
    )
    reduced = vocabulary.reduce_softmax(local, weight, axis="stage", z_loss=z_loss)
    of_rows, of_hidden = vocabulary.gradient_pass(reduced.local, hidden, rows, labels, first=first)
    if barriers == 1:
        assert of_hidden is None
        of_hidden = reduced.hidden_gradient
    else:
        assert reduced.hidden_gradient is None
        of_hidden = jax.lax.psum(of_hidden, "stage")
    return (weight * (reduced.nll + z_loss * reduced.lse**2)).sum(), of_hidden, of_rows


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, {"z_loss": 0.0, "soft_cap": None}),
        pytest.param(4, {"z_loss": 0.1, "soft_cap": 2.0}, marks=pytest.mark.slow),
        pytest.param(8, {"z_loss": 0.0, "soft_cap": None}, marks=pytest.mark.slow),
    ],
)
def test_both_algorithms_equal_the_dense_loss_and_its_gradients(barriers, devices, options):
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, rows = random.normal(size=(N, D)), random.normal(size=(VOCAB, D))
        labels = jnp.asarray(random.integers(0, VOCAB, N).astype(np.int32)).at[0].set(VOCAB - 1)
        weight = random.uniform(size=N)
        expected, (of_hidden, of_rows) = jax.value_and_grad(
            partial(dense, **options), argnums=(0, 1)
        )(hidden, rows, labels, weight)
        share = -(-VOCAB // devices)
        padded = np.concatenate([rows, np.full((share * devices - VOCAB, D), 7.0)])
        run = jax.shard_map(
            partial(divided, barriers=barriers, **options),
            mesh=mesh.make(mesh.MeshShape(data=1, stage=devices)),
            in_specs=(P(), P("stage"), P(), P()),
            out_specs=(P(), P(), P("stage")),
            check_vma=False,
        )
        found = jax.jit(run)(*(jnp.asarray(x, jnp.float32) for x in (hidden, padded)),
                             labels, jnp.asarray(weight, jnp.float32))  # fmt: skip
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(found[1], of_hidden, atol=1e-5)
    np.testing.assert_allclose(found[2][:VOCAB], of_rows, atol=1e-5)
    assert not np.any(found[2][VOCAB:])
