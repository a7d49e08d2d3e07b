"""LongPO: the formula in float64, its identities with DPO, gradients, and pairs as arrays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.data import pairs
from lminf.data.pairs import Pair
from lminf.errors import InputError
from lminf.objectives import terms
from lminf.objectives.preference import DPO, ShortToLong, longpo
from lminf.objectives.terms import CrossEntropy
from tests.models import specs
from tests.train import making
from tests.train.test_preference import log_probs

BETA, SCALE = 0.3, 0.7
LONG, SHORT = 20, 9  # tokens of rows


def drawn_pairs(count=8, *, long=(10, 16), short=(3, 6), same=False):
    """Pairs of answers of 1 to 4 tokens to prompts of different lengths."""
    random = np.random.default_rng(4)

    def text(low, high):
        return random.integers(1, making.SPEC.vocab_size, random.integers(low, high))

    made = []
    for _ in range(count):
        prompt = text(*long)
        made.append(Pair(text(1, 4), text(1, 4), prompt, prompt if same else text(*short)))
    return made


def batch_of(made, **sizes):
    return pairs.batch(made, length=LONG, **{"reference_length": SHORT, **sizes})


class Nats(terms.Model):
    """A model whose nats of every target are drawn, for terms alone."""

    def __init__(self, batch, seed, alike=()):
        random = np.random.default_rng(seed)
        self.batch = {name: jnp.asarray(x) for name, x in batch.items()}
        self.nll = {
            name.removesuffix("targets"): random.exponential(3, x.shape)
            for name, x in batch.items() if name.endswith("targets")
        }  # fmt: skip
        self.nll |= dict(alike)

    def token_loss(self, prefix=""):
        nll = jnp.asarray(self.nll[prefix], jnp.float32)
        return terms.TokenLoss(nll, nll)


def evaluate(objective, policy, reference):
    weights = tuple(term.weight(policy.batch) for term in objective)
    return terms.evaluate(objective, policy, {"reference": reference}, weights)


def formula(policy, reference, made):
    """(minimised, margins) of LongPO from its formula, pair by pair in float64."""
    margins, nll, tokens = [], 0.0, 0
    for row, pair in enumerate(made):
        ratio = {}
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            first, last = len(pair.prompt) - 1, len(pair.prompt) + len(answer) - 1
            log_policy = -policy.nll[f"{name}_"][row, first:last].sum()
            first, last = (len(pair.reference_prompt) - 1,
                           len(pair.reference_prompt) + len(answer) - 1)  # fmt: skip
            log_reference = -reference.nll[f"reference_{name}_"][row, first:last].sum()
            ratio[name] = log_policy - log_reference
            if name == "chosen":
                nll, tokens = nll - log_policy, tokens + len(answer)
        margins.append(BETA * (ratio["chosen"] - ratio["rejected"]))
    preference = np.mean([-np.log(1 / (1 + np.exp(-margin))) for margin in margins])
    return nll / tokens + SCALE * preference, np.array(margins)


def test_the_loss_is_the_formula_pair_by_pair():
    made = drawn_pairs()
    policy, reference = (Nats(batch_of(made), seed) for seed in (0, 1))
    minimised, reported = evaluate(longpo(beta=BETA, scale=SCALE), policy, reference)
    expected, margins = formula(policy, reference, made)
    assert float(minimised) == pytest.approx(expected, rel=1e-5)
    assert float(reported["margin"]) == pytest.approx(margins.mean(), rel=1e-5)
    assert float(reported["preferred"]) == (margins > 0).mean()


def test_with_one_prompt_for_both_it_is_dpo_and_the_loss_of_the_better_answer():
    made = drawn_pairs(same=True)
    batch = batch_of(made, reference_length=LONG)
    policy = Nats(batch, 0)
    read = Nats(batch, 1)
    alike = {f"reference_{a}": read.nll[a] for a in ("chosen_", "rejected_")}
    reference = Nats(batch, 1, alike)
    both = DPO(BETA, scale=SCALE), CrossEntropy(prefix="chosen_")
    assert evaluate(longpo(beta=BETA, scale=SCALE), policy, reference) == evaluate(
        both, policy, reference
    )
    itself = Nats(batch, 0, {f"reference_{a}": policy.nll[a] for a in ("chosen_", "rejected_")})
    minimised, reported = evaluate((ShortToLong(BETA),), policy, itself)
    assert float(minimised) == pytest.approx(np.log(2), abs=1e-6)
    assert float(reported["margin"]) == 0


def test_swapping_a_pair_flips_its_margin():
    made = drawn_pairs()
    models = [Nats(batch_of(made), seed) for seed in (0, 1)]
    _, reported = evaluate((ShortToLong(BETA),), *models)
    other = {"chosen": "rejected", "rejected": "chosen"}
    for model in models:
        model.batch, model.nll = (
            {
                re.sub("chosen|rejected", lambda m: other[m[0]], name): x
                for name, x in arrays.items()
            }
            for arrays in (model.batch, model.nll)
        )
    _, swapped = evaluate((ShortToLong(BETA),), *models)
    assert float(swapped["margin"]) == pytest.approx(-float(reported["margin"]), rel=1e-6)
    assert float(swapped["preferred"]) == 1 - float(reported["preferred"])


def test_prompts_and_padding_carry_no_loss():
    made = drawn_pairs()
    policy, reference = (Nats(batch_of(made), seed) for seed in (0, 1))
    before, _ = evaluate(longpo(), policy, reference)
    for model in (policy, reference):
        for prefix, nll in model.nll.items():
            nll[np.asarray(model.batch[f"{prefix}weights"]) == 0] += 7.0
    after, _ = evaluate(longpo(), policy, reference)
    assert float(after) == float(before)


def test_rows_hold_prompt_and_answer_and_count_the_answer():
    pair = Pair(*(np.array(x) for x in ([7, 8], [9], [1, 2, 3], [4])))
    batch = pairs.batch([pair], length=5, reference_length=2)
    np.testing.assert_array_equal(batch["chosen_tokens"], [[1, 2, 3, 7, 8]])
    np.testing.assert_array_equal(batch["chosen_targets"], [[2, 3, 7, 8, 0]])
    np.testing.assert_array_equal(batch["chosen_weights"], [[0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(batch["reference_rejected_tokens"], [[4, 9]])
    np.testing.assert_array_equal(batch["reference_rejected_weights"], [[1, 0]])
    assert set(batch) == set(ShortToLong().arrays)
    assert set(pairs.batch([pair], length=5)) == set(DPO().arrays)


def test_a_pair_that_does_not_fit_or_lacks_a_part_is_refused():
    pair = Pair(*(np.array(x) for x in ([7, 8], [9], [1, 2, 3], [4])))
    with pytest.raises(InputError, match=r"policy's prompt and answer of pair 0 take 5 tokens, mo"):
        pairs.batch([pair], length=3)
    with pytest.raises(InputError, match=r"reference's prompt and answer of pair 0 take 3 tokens"):
        pairs.batch([pair], length=4, reference_length=1)
    with pytest.raises(InputError, match="the rejected of a pair is empty; give at least one tok"):
        Pair(pair.chosen, np.array([], int), pair.prompt, pair.reference_prompt)


# --- In a step ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_minimises_the_formula_on_a_model():
    made = making.program(objective=longpo(beta=BETA, scale=SCALE))
    batch = batch_of(drawn_pairs())
    reference = making.host(specs.parameters(making.SPEC, seed=5))
    _, metrics = made.step(made.start(making.params(), {"reference": reference}),
                           making.put(made, batch))  # fmt: skip
    ratio = {
        answer: log_probs(making.params(), batch, f"{answer}_")
        - log_probs(reference, batch, f"reference_{answer}_")
        for answer in ("chosen", "rejected")
    }
    margin = BETA * (ratio["chosen"] - ratio["rejected"])
    nll = -log_probs(making.params(), batch, "chosen_").sum() / batch["chosen_weights"].sum()
    assert float(metrics.loss) == pytest.approx(nll, abs=1e-4)
    assert float(metrics.reported["margin"]) == pytest.approx(margin.mean(), abs=1e-4)


@pytest.mark.slow
def test_gradients_are_finite_differences():
    """Along random directions, of the policy alone: the reference is frozen."""
    made = making.program(objective=longpo(beta=BETA, scale=SCALE))
    batch, reference = batch_of(drawn_pairs()), specs.parameters(making.SPEC, seed=5)
    state = made.start(making.params(), {"reference": reference})
    params, arrays = state.params, making.put(made, batch)
    weights = tuple(term.weight(arrays) for term in made.objective)

    @jax.jit
    def minimised(params):
        return made.loss_fn(state, arrays, weights)(params)[0]

    gradient = jax.jit(jax.grad(minimised))(params)
    random = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(
            lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params
        )
        step = 1e-3
        moved = [
            float(minimised(jax.tree.map(lambda x, d, s=sign * step: x + s * d, params, direction)))
            for sign in (1, -1)
        ]
        slope = sum(float((g * d).sum()) for g, d in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))  # fmt: skip
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.02, abs=0.02)


@pytest.mark.slow
def test_on_a_mesh_and_in_pieces_it_is_the_same():
    found = []
    sharded = {"strategy": "zero3", "fsdp": 2, "data": 2, "grad_accum_steps": 2}
    for changes in ({}, sharded):
        made = making.program(objective=longpo(beta=BETA, scale=SCALE), **changes)
        state, metrics = made.step(made.start(making.params()),
                                   making.put(made, batch_of(drawn_pairs())))  # fmt: skip
        found.append((state.params, float(metrics.loss), float(metrics.reported["margin"])))
    assert found[1][1:] == pytest.approx(found[0][1:], abs=making.ATOL)
    assert making.largest_difference(found[0][0], found[1][0]) < 1e-3
