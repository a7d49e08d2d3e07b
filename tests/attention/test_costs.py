"""What programs cost, before they run: memory linear in the text, with a small constant, and steps
of decoding that leave alone what they need not look at.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from lminf.attention import attend, cache, rope, scores
from lminf.attention.policies.eviction import TOVA
from lminf.attention.policies.hip import HiP
from lminf.attention.policies.longheads import LongHeads
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import Full, LMInfinite, Policy, SelfExtend
from tests.attention import cases
from tests.attention.test_sparse import POLICIES as SPARSE


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


@pytest.mark.slow
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


# --- One token after many -------------------------------------------------------------------------

SLOTS = 2048


def decoding_step(policy: Policy, scoring: scores.ScoreConfig, slots: int = SLOTS):
    """The function of one layer, and its arguments' shapes; the cache comes last."""
    shape = cache.CacheShape(1, slots, 2, 1, cases.WIDTH, jnp.float32)
    empty = jax.eval_shape(lambda: cache.create(policy, shape, layers=1))
    of_layer = {"layer_index": 9} if getattr(policy, "layer_thresholds", ()) else {}

    def run(q, k, v, at, held):
        step, pos = attend.extend(policy, scoring, held.layout, held.pos, at)
        out, kv = step(q, k, v, held.kv, jnp.int32(0), **of_layer)
        return out, held.updated(kv, pos)

    q, k = (jax.ShapeDtypeStruct((1, 1, heads, cases.WIDTH), jnp.float32) for heads in (2, 1))
    return run, (q, k, k, jax.ShapeDtypeStruct((1, 1), jnp.int32), empty)


def angles(jaxpr: Jaxpr) -> Iterator[int]:
    """Sizes of the arrays of cosines and sines that a program computes, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("cos", "sin"):
            angle: Any = equation.outvars[0].aval
            yield math.prod(angle.shape)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from angles(getattr(parameter, "jaxpr", parameter))


GROWING = rope.Rotary(100.0, cases.WIDTH, "half", rope.DynamicNTK(2.0, 256))


@pytest.mark.parametrize(
    ("policy", "encoding"),
    [
        *((policy, cases.HALF) for policy in SPARSE.values()),
        (HiP(8, 6, 3, dense_layers=99), cases.HALF),
        (LongHeads(16, chunk=4), GROWING),
        (Full(), GROWING),  # whose keys stay as they are, because the schedule changes with each
    ],
)
def test_a_decoding_step_does_not_compute_the_angles_of_all_positions(policy, encoding):
    step, arguments = decoding_step(policy, scores.ScoreConfig(encoding, 1.0, None))
    sizes = list(angles(jax.make_jaxpr(step)(*arguments).jaxpr))
    assert sizes
    assert max(sizes) < SLOTS


@pytest.mark.slow
def test_what_looks_angles_up_does_not_compute_them_anew():
    """XLA may move a cosine to each of the places that its result is looked up from."""
    policy = LongHeads(256, chunk=64)
    run, arguments = decoding_step(policy, cases.scoring("rotary"))
    program = jax.jit(run, donate_argnums=4).lower(*arguments).compile()
    looked_up = 2 * policy.attended * cases.WIDTH  # 2 heads, a cosine and a sine for a pair
    chunk_summary = 2 * policy.chunk * (policy.chunk + 1)  # exponentials, once a chunk
    assert program.cost_analysis()["transcendentals"] - chunk_summary < looked_up


@pytest.mark.parametrize(
    "policy",
    [
        TopK(8, 3, from_layer=0),
        pytest.param(Full(), marks=pytest.mark.slow),
        pytest.param(TOVA(SLOTS), marks=pytest.mark.slow),
    ],
)
def test_a_decoding_step_copies_no_cache(policy):
    run, arguments = decoding_step(policy, cases.scoring("rotary"))
    program = jax.jit(run, donate_argnums=4).lower(*arguments).compile()
    keys = arguments[-1].k
    copied = f"f32[{','.join(map(str, keys.shape))}]"
    lines = [line for line in str(program.as_text()).splitlines() if " copy(" in line]
    assert not [line for line in lines if copied in line]
