"""Memory of the compiled program, before it runs: linear in the text, with a small constant."""

import jax
import jax.numpy as jnp
import pytest

from lminf.attention import attend
from lminf.attention.policy import Full, LMInfinite, SelfExtend
from tests.attention import cases


def temporary_bytes(policy, tokens, *, implementation, gradients=False):
    scoring = cases.scoring("rotary")

    def run(q, k, v):
        at = jnp.arange(tokens, dtype=jnp.int32)[None]
        return attend.prefill(policy, scoring, at, implementation=implementation)(q, k, v)

    q, k = (jax.ShapeDtypeStruct((1, tokens, n, cases.WIDTH), jnp.float32) for n in (2, 1))
    function, shapes = (cases.with_gradients(run), (q, k, k, q)) if gradients else (run, (q, k, k))
    return cases.compiled(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


LINEAR = [
    (LMInfinite(128, 8), False),
    pytest.param(LMInfinite(128, 8), True, marks=pytest.mark.slow),
    pytest.param(SelfExtend(128, 4), False, marks=pytest.mark.slow),
    pytest.param(SelfExtend(128, 4), True, marks=pytest.mark.slow),
    pytest.param(Full(), True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("policy", "gradients"), LINEAR)
def test_the_tiled_form_grows_by_less_than_1_6_when_the_text_doubles(policy, gradients):
    # From 2,048 positions on, blocks over all keys are four times as long: compare equal blocks.
    first = 2048 if policy == Full() else 1024
    sizes = [
        temporary_bytes(policy, n, implementation="xla_chunked", gradients=gradients)
        for n in (first, 2 * first, 4 * first)
    ]
    assert sizes[1] < 1.6 * sizes[0]
    assert sizes[2] < 1.6 * sizes[1]


@pytest.mark.slow
def test_the_dense_form_would_grow_fourfold():
    """What the contract above is about, and that this way of measuring sees it."""
    policy = LMInfinite(128, 8)
    short, long = (temporary_bytes(policy, n, implementation="reference") for n in (512, 1024))
    assert long > 3.5 * short
    assert temporary_bytes(policy, 1024, implementation="xla_chunked") < long / 4
