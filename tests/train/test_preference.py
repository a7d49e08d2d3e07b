"""DPO: the formula of the paper in float64, meshes and pieces of a batch, frozen references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import heads
from lminf.objectives.preference import DPO
from lminf.objectives.terms import CrossEntropy
from lminf.train import batches
from tests.models import specs
from tests.train import making

BETA = 0.3


def pairs(rows=making.ROWS):
    """Prompts of 6 tokens with two answers each; answers differ in length."""
    random = np.random.default_rng(3)
    batch = {}
    for answer, length in (("chosen_", 12), ("rejected_", 9)):
        text = random.integers(0, making.SPEC.vocab_size, (rows, making.LENGTH + 1))
        place = np.arange(making.LENGTH)
        counts = np.broadcast_to((place >= 5) & (place < length), (rows, making.LENGTH))
        batch |= {
            f"{answer}tokens": text[:, :-1].astype(np.int32),
            f"{answer}targets": text[:, 1:].astype(np.int32),
            f"{answer}weights": counts.astype(np.float32),
        }
    return batch


def program(**changes):
    return making.program(objective=(DPO(BETA),), **changes)


def reference():
    return making.host(specs.parameters(making.SPEC, seed=5))


def log_probs(params, batch, answer):
    """Of every row's answer, in float64, from the logits of the whole model."""
    tokens, targets = (jnp.asarray(batch[f"{answer}{name}"]) for name in ("tokens", "targets"))
    module, params = making.program().module, jax.tree.map(jnp.asarray, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = jax.jit(module.apply)({"params": params}, tokens, positions=positions)
    logits = np.asarray(heads.lm(making.SPEC, params, hidden), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    return (chosen * batch[f"{answer}weights"]).sum(1)


@pytest.mark.slow
def test_the_loss_is_that_of_the_paper():
    made, batch = program(), pairs()
    state = made.start(making.params(), {"reference": reference()})
    _, metrics = made.step(state, making.put(made, batch))
    ratio = {
        answer: log_probs(making.params(), batch, answer) - log_probs(reference(), batch, answer)
        for answer in ("chosen_", "rejected_")
    }
    margin = BETA * (ratio["chosen_"] - ratio["rejected_"])
    assert float(metrics.loss) == pytest.approx(np.log1p(np.exp(-margin)).mean(), abs=1e-4)
    assert float(metrics.reported["preferred"]) == pytest.approx((margin > 0).mean())
    assert float(metrics.reported["margin"]) == pytest.approx(margin.mean(), abs=1e-4)


@pytest.mark.slow
def test_a_model_that_is_its_own_reference_loses_log_2():
    made = program()
    _, metrics = made.step(made.start(making.params()), making.put(made, pairs()))
    assert float(metrics.loss) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_training_widens_the_margin_and_leaves_the_reference():
    made = program()
    state, batch = made.start(making.params()), making.put(made, pairs())
    before = making.host(state.references)
    margins = []
    for _ in range(4):
        state, metrics = made.step(state, batch)
        margins.append(float(metrics.reported["margin"]))
    assert margins[-1] > margins[0] + 0.05
    assert making.largest_difference(state.references, before) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("zero3", {"fsdp": 4, "data": 2}),
        ("tensor", {"tensor": 2, "data": 2}),
        ("data", {"grad_accum_steps": 2}),
    ],
)
def test_on_a_mesh_and_in_pieces_it_is_the_same(strategy, changes):
    found = []
    for made in (program(), program(strategy=strategy, **changes)):
        state = made.start(making.params(), {"reference": reference()})
        state, metrics = made.step(state, making.put(made, pairs()))
        found.append((state.params, float(metrics.loss)))
        if "fsdp" in changes and made.mesh.size > 1:
            laid_out = state.references["reference"]["layers"]["attention"]["wq"].sharding
            assert laid_out == made.shardings.params["layers"]["attention"]["wq"]
    assert found[1][1] == pytest.approx(found[0][1], abs=making.ATOL)
    assert making.largest_difference(found[0][0], found[1][0]) < 1e-3


@pytest.mark.slow
def test_terms_are_added_by_their_scale():
    batch = {**pairs(), **making.tokens()}
    both = making.program(objective=(CrossEntropy(0.5), DPO(BETA, scale=2.0)))
    alone = making.program(objective=(CrossEntropy(),)), program()
    parts = [
        jax.jit(made.gradients)(
            making.params(), making.put(made, batch), made.start(making.params())
        )[1]
        for made in alone
    ]
    state = both.start(making.params())
    _, found = jax.jit(both.gradients)(making.params(), making.put(both, batch), state)
    expected = jax.tree.map(lambda one, two: 0.5 * one + 2.0 * two, *parts)
    assert making.largest_difference(found, expected) < 1e-5


def test_a_batch_without_the_arrays_of_its_objective_is_refused():
    made = program()
    place = {
        "mesh": made.mesh,
        "strategy": made.strategy,
        "pieces": 1,
        "arrays": made.arrays,
    }
    batches.check(pairs(), **place)
    with pytest.raises(InputError, match="it must hold chosen_tokens, chosen_targets"):
        batches.check(making.tokens(), **place)
    lacking = {name: x for name, x in pairs().items() if name != "rejected_weights"}
    with pytest.raises(InputError, match=r"it must hold .*rejected_weights"):
        batches.check(lacking, **place)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_not_above_0_is_refused(beta):
    with pytest.raises(InputError, match=r"DPO.beta is .* above 0"):
        DPO(beta)
