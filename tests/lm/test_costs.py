"""What the compiled programs cost, before they run: losses without logits, decoding without end."""

import jax
import jax.numpy as jnp
import pytest

from lminf.attention.policy import Full, LMInfinite
from lminf.lm import generate, nll
from lminf.lm.lm import LM
from lminf.models import decoder
from lminf.objectives import cross_entropy
from tests.attention import cases
from tests.models import specs


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def abstract_parameters(spec):
    return jax.eval_shape(lambda: decoder.init(spec, key=jax.random.key(0)))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_loss_holds_one_block_of_logits_whatever_the_vocabulary(gradients):
    """Neither a larger vocabulary nor more text makes it hold more of them."""

    def temporary_bytes(vocabulary, tokens):
        spec = specs.change(specs.LLAMA, vocab_size=vocabulary)

        def run(params, hidden, targets):
            return cross_entropy.token_nll(spec, params, hidden, targets).sum()

        arrays = shape(1, tokens, spec.width), shape(1, tokens, dtype=jnp.int32)
        program = cases.compiled(jax.grad(run, (0, 1)) if gradients else run)
        program = program.lower({"embed": shape(vocabulary, 16)}, *arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    sizes = ((4096, 1024), (8192, 1024), (8192, 4096))
    small, wide, long = (temporary_bytes(*size) for size in sizes)
    assert wide - small < 0.1 * 1024 * (8192 - 4096) * 4
    assert long - wide < 0.1 * (4096 - 1024) * 8192 * 4


@pytest.mark.slow
def test_scoring_a_chunk_holds_no_more_than_its_states_and_one_chunk_of_logits():
    spec = specs.change(specs.shallow(specs.LLAMA, 1), vocab_size=8192)
    module = decoder.Decoder(spec, (LMInfinite(64, 4),), implementation="xla_chunked")

    def temporary_bytes(tokens):
        caches = jax.eval_shape(
            lambda: decoder.init_caches(
                spec, module.policies, batch=1, capacity=10**9, dtype=jnp.float32
            )
        )
        ids = shape(1, tokens, dtype=jnp.int32)

        def score(params, tokens, targets, positions, caches):
            hidden, caches = generate.forward(module, None, params, tokens, positions, caches)
            return nll._losses(spec, None, params, hidden, targets), caches

        program = jax.jit(score).lower(abstract_parameters(spec), ids, ids, ids, caches)
        return program.compile(cases.fast_options()).memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) - temporary_bytes(1024) < 0.2 * 1024 * 8192 * 4


def step(policy, capacity, batch=1):
    """The program of one decoding step, not compiled yet."""
    spec = specs.shallow(specs.LLAMA, 1)
    module = decoder.Decoder(spec, (policy,))
    caches = jax.eval_shape(
        lambda: decoder.init_caches(
            spec, module.policies, batch=batch, capacity=capacity, dtype=jnp.float32
        )
    )
    ids = shape(batch, 1, dtype=jnp.int32)
    return generate.forward.lower(module, None, abstract_parameters(spec), ids, ids, caches)


@pytest.mark.parametrize("policy", [Full(), LMInfinite(2040, 8)], ids=str)
def test_devices_that_read_together_hold_the_cache_once(policy):
    """Each its share of the slots, written in place; of one layer of 16 they gather all."""
    spec = specs.change(specs.LLAMA, num_layers=16, windows=(None,) * 16, trained_length=2048)
    lm = LM(spec, None, None, policy).with_devices(jax.devices()[:2])
    caches = jax.eval_shape(lambda: lm.init_caches(batch=1, capacity=2048))
    ids = shape(1, 16, dtype=jnp.int32)
    program = generate.forward.lower(
        lm.decoder, lm.mesh, abstract_parameters(spec), ids, ids, caches
    )
    memory = program.compile(cases.fast_options()).memory_analysis()  # of one device
    (layers,) = caches
    share = (layers.k.size + layers.v.size) * 4 / 2
    assert share < memory.alias_size_in_bytes < 1.1 * share
    assert memory.temp_size_in_bytes < share


def test_a_decoding_step_under_a_window_is_one_program_for_streams_of_any_length():
    program = step(LMInfinite(24, 4), 1000).as_text()
    assert step(LMInfinite(24, 4), 10**9).as_text() == program


@pytest.mark.slow
def test_the_work_of_a_decoding_step_is_that_of_what_is_kept():
    def costs(policy, capacity):
        costs = step(policy, capacity).compile(cases.fast_options()).cost_analysis()
        return costs["flops"], costs["bytes accessed"]

    kept, full, double = (
        costs(*case) for case in ((LMInfinite(252, 4), 10**9), (Full(), 256), (Full(), 512))
    )
    for bounded, small, large in zip(kept, full, double, strict=True):
        assert large > 1.2 * small
        assert bounded < 1.5 * small
