"""What is said of a model's cost, counted another way."""

import jax.numpy as jnp
import pytest

from lminf.attention.policy import PerHead
from lminf.models import cost
from tests.attention import cases
from tests.models import specs

ONE_EACH = {name: p for name, p in cases.POLICIES.items() if not isinstance(p, PerHead)}


@pytest.mark.parametrize("length", [1, 4, 8, 40])  # within every window, and past them all
@pytest.mark.parametrize("name", ONE_EACH)
def test_pairs_attended_are_those_of_the_mask(name, length):
    to, at = jnp.arange(length)[:, None], jnp.arange(length)[None]
    seen = ONE_EACH[name].visible(to, at)
    assert cost.attended_pairs(ONE_EACH[name], length) == int(seen.sum())


def test_flops_of_attention_are_those_of_each_heads_own_policy():
    first, second = cases.POLICIES["per_head_bounded"].policies
    apart = [cost.attention_flops(specs.LLAMA, (part,) * 4, 40) for part in (first, second)]
    mixed = cost.attention_flops(specs.LLAMA, (PerHead((first, second)),) * 4, 40)
    assert 2 * mixed == sum(apart)
    # A score and a weighted value: two products of head_dim terms, for every head and layer.
    assert apart[0] == 4 * 4 * 2 * 2 * 8 * cost.attended_pairs(first, 40)
