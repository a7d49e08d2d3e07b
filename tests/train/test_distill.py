"""The short-to-long KL: its formula in float64, and what it is of a model beside itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import heads
from lminf.objectives.distill import ShortToLongKL, sft_with_kl
from lminf.objectives.terms import CrossEntropy
from tests import stated_ranges
from tests.train import making
from tests.train.test_preference import reference

SHORT, LONG = 3, 7  # tokens of prompts
ANSWERS = (4, 2, 1, 4, 3, 2, 1, 4)  # tokens of the answers
REFERENCE_LENGTH = 9


def batch(short: int = SHORT, length: int = REFERENCE_LENGTH):
    """Answers after long prompts, and the same after short ones."""
    random = np.random.default_rng(5)
    made = {}
    rows = making.ROWS
    answers = [random.integers(0, making.SPEC.vocab_size, ANSWERS[row % 8]) for row in range(rows)]
    prompts = random.integers(0, making.SPEC.vocab_size, (rows, LONG))
    for prefix, prompt, size in (("chosen_", LONG, making.LENGTH),
                                 ("reference_chosen_", short, length)):  # fmt: skip
        text = np.zeros((rows, size + 1), np.int32)
        weights = np.zeros((rows, size), np.float32)
        for row, answer in enumerate(answers):
            text[row, :prompt] = prompts[row, :prompt]
            text[row, prompt : prompt + len(answer)] = answer
            weights[row, prompt - 1 : prompt - 1 + len(answer)] = 1
        made |= {f"{prefix}tokens": text[:, :-1], f"{prefix}targets": text[:, 1:],
                 f"{prefix}weights": weights}  # fmt: skip
    return made


def log_p(params, arrays, prefix, prompt):
    """Of each answer, float64 [tokens, V], by the whole model's logits."""
    tokens = jnp.asarray(arrays[f"{prefix}tokens"])
    module, params = making.program().module, jax.tree.map(jnp.asarray, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = jax.jit(module.apply)({"params": params}, tokens, positions=positions)
    logits = np.asarray(heads.lm(making.SPEC, params, hidden), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return [logits[row, prompt - 1 : prompt - 1 + ANSWERS[row % 8]] for row in range(making.ROWS)]


@pytest.mark.slow
def test_the_distance_is_that_of_the_formula():
    made, arrays = making.program(objective=sft_with_kl(scale=0.7)), batch()
    state = made.start(making.params(), {"reference": reference()})
    _, metrics = made.step(state, making.put(made, arrays))
    policy = log_p(making.params(), arrays, "chosen_", LONG)
    frozen = log_p(reference(), arrays, "reference_chosen_", SHORT)
    tokens = sum(map(len, policy))
    kl = sum((np.exp(p) * (p - q)).sum() for p, q in zip(policy, frozen, strict=True)) / tokens
    assert kl > 0.01
    assert float(metrics.reported["kl"]) == pytest.approx(kl, rel=1e-4)
    nll = -sum(
        p[np.arange(len(p)), targets[weights > 0]].sum()
        for p, targets, weights in zip(policy, arrays["chosen_targets"], arrays["chosen_weights"],
                                       strict=True)
    ) / tokens  # fmt: skip
    assert float(metrics.loss) == pytest.approx(nll, rel=1e-4)


@pytest.mark.slow
def test_a_model_is_at_no_distance_from_itself_after_one_prompt_and_goes_nowhere():
    made = making.program(objective=(ShortToLongKL(),))
    arrays = batch(short=LONG, length=making.LENGTH)
    start = jax.tree.map(jnp.asarray, making.params())

    @jax.jit
    @jax.value_and_grad
    def distance(params):
        batch = {name: jnp.asarray(array) for name, array in arrays.items()}
        references = {"reference": made.model(start, batch)}
        return made.objective[0](made.model(params, batch), references)[0]

    total, gradients = distance(start)
    assert abs(float(total)) < 1e-5
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients)) < 1e-5


def test_a_scale_outside_its_range_is_refused():
    assert stated_ranges.without_range(ShortToLongKL) == []
    with pytest.raises(InputError, match=r"^ShortToLongKL\.scale is "):
        ShortToLongKL(scale=0.0)
    assert sft_with_kl()[1] == CrossEntropy(prefix="chosen_")
