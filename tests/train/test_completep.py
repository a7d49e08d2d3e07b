"""CompleteP: nothing at the base's size, and the table of the paper at others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import policy as policies
from lminf.errors import InputError
from lminf.models import decoder, heads, spec
from lminf.parallel import mesh, partition
from lminf.train.completep import CompleteP
from lminf.train.optim import AdamW, Lion
from lminf.train.step import TrainStep
from tests.models import specs

BASE = CompleteP(width=16, layers=2)
# With an epsilon of the gradients' size, which the paper's table scales too.
ADAMW = AdamW(epsilon=1e-3, weight_decay=0.1)


def shape(width: int, layers: int, *, tied: bool = False) -> spec.ModelSpec:
    return spec.llama(
        vocab_size=64, width=width, num_layers=layers, num_heads=width // 8,
        num_kv_heads=width // 8, hidden_dim=2 * width, trained_length=16, tied=tied,
    )  # fmt: skip


@pytest.mark.slow
def test_the_base_model_trains_as_without():
    own = shape(16, 2)
    made = BASE.spec(own)
    assert dataclasses.replace(made, family="llama") == own
    params = specs.parameters(own)
    gradient = jax.tree.map(lambda leaf: jnp.cos(17 * leaf), params)
    plain, scaled = ADAMW.build(), BASE.optimizer(ADAMW, made)
    expected, _ = plain.update(gradient, plain.init(params), params)
    found, _ = scaled.update(gradient, scaled.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Of a model m_N = 4 times as wide and m_L = 2 times as deep, by the table of the paper for α = 1:
# what the first step adds to a parameter per unit of the base's rate.
TABLE = {
    "embed": lambda g, w: g / (abs(g) + 1e-3 / 4) + 0.1 * w,
    "head": lambda g, w: g / (abs(g) + 1e-3 / 4) + 0.1 * w,
    # Rate eta / 4 with decay 4 lambda.
    "layers/mlp/w_up": lambda g, w: (g / (abs(g) + 1e-3 / 8) + 0.4 * w) / 4,
    "layers/attention/wo": lambda g, w: (g / (abs(g) + 1e-3 / 8) + 0.4 * w) / 4,
    "layers/mlp_norm/scale": lambda g, w: g / (abs(g) + 1e-3 / 8),
    "final_norm/scale": lambda g, w: g / (abs(g) + 1e-3 / 4),
}


def test_the_first_step_is_the_papers():
    """The source's tables are 2 = m_N ** 0.5 times ours, with the multipliers of `spec` in ours."""
    made = BASE.spec(shape(64, 4))
    assert (made.embed_scale, made.residual_scale, made.logit_scale) == (2.0, 0.5, 0.5)
    params = specs.parameters(made)
    gradient = jax.tree.map(lambda leaf: 1e-3 * jnp.cos(17 * leaf), params)
    optimizer = BASE.optimizer(ADAMW, made)
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    leaves = {}

    def keep(key_path, *each):
        leaves[partition.path_of(key_path)] = each

    jax.tree_util.tree_map_with_path(keep, params, gradient, update)
    for path, law in TABLE.items():
        w, g, change = (np.asarray(leaf, np.float64) for leaf in leaves[path])
        ours = 2 if path in ("embed", "head") else 1
        expected = law(g / ours, w * ours) / ours
        np.testing.assert_allclose(-change, expected, rtol=2e-5, atol=1e-8, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_few_steps_move_every_size_alike(tied):
    """The coordinate check. Without it the widest's logits move 2.8 times as far as the base's."""
    base = CompleteP(width=64, layers=2)
    sizes = [(64, 2), (256, 2), (512, 2), (64, 8)]
    moved = np.array([of_steps(*size, tied=tied, transfer=base) for size in sizes])
    assert (moved.max(0) < 1.5 * moved.min(0)).all(), moved
    plain = [of_steps(*size, tied=tied, transfer=None)[1] for size in ((64, 2), (512, 2))]
    assert plain[1] > 2 * plain[0], plain


def of_steps(width, layers, *, tied, transfer, steps=4) -> tuple[float, float]:
    """How far some steps move the final hidden states of their batch, root mean square, and the
    logits of its targets, above the mean of all logits.

    Not the root mean square over all logits: those of the other tokens move by what their rows
    overlap with the target's by chance, width ** -0.5.
    """
    own = shape(width, layers, tied=tied)
    made = own if transfer is None else transfer.spec(own)
    optimizer = AdamW().build() if transfer is None else transfer.optimizer(AdamW(), made)
    step = TrainStep(
        made, (policies.FULL,) * layers, mesh.single(), partition.STRATEGIES["data"], optimizer,
        learning_rate=lambda _: jnp.float32(4e-3),
    )  # fmt: skip
    text = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    batch = {"tokens": jnp.asarray(text[:, :-1]), "targets": jnp.asarray(text[:, 1:])}
    positions = jnp.tile(jnp.arange(16, dtype=jnp.int32), (8, 1))

    @jax.jit
    def outputs(params):
        hidden, _ = step.module.apply({"params": params}, batch["tokens"], positions=positions)
        logits = heads.lm(made, params, hidden)
        target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)
        return hidden, target.mean() - logits.mean()

    state = step.start(decoder.init(made, key=jax.random.key(0)))
    before = outputs(state.params)
    for _ in range(steps):
        state, _ = step.step(state, batch)
    after = outputs(state.params)
    return float(jnp.sqrt(jnp.mean((after[0] - before[0]) ** 2))), float(after[1] - before[1])


def test_what_it_is_not_derived_for_is_one_sentence():
    with pytest.raises(InputError, match="derived for AdamW, not Lion"):
        BASE.optimizer(Lion(), shape(32, 2))
    with pytest.raises(InputError, match="and this is gemma2; leave completep out"):
        BASE.spec(specs.GEMMA)
