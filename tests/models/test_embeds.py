"""A decoder that reads embeddings in place of tokens, and one that reads in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policies.eviction import SirLLM
from lminf.attention.policy import FULL, Window
from lminf.errors import InputError
from lminf.models import decoder
from lminf.parallel import mesh, partition
from lminf.parallel.attention import Sharded
from tests.attention import cases
from tests.models import specs

SPEC = specs.shallow(specs.GEMMA, 2)  # its embeddings are scaled
PARAMS = {"params": specs.parameters(SPEC)}
ENCODER = decoder.Decoder(SPEC, (FULL, FULL))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SPEC.vocab_size, (1, 12)), jnp.int32)
POSITIONS = jnp.arange(12, dtype=jnp.int32)[None]
PACKED = jnp.asarray([[*range(5), *range(7)]], jnp.int32)
SEGMENTS = jnp.asarray([[0] * 5 + [1] * 7], jnp.int32)
EMBEDS = decoder.embed_tokens(SPEC, PARAMS["params"], TOKENS)


def test_embeddings_of_tokens_give_their_hidden_states_bit_for_bit():
    module = decoder.Decoder(SPEC, (FULL, FULL), dtype=jnp.bfloat16)

    @cases.compiled
    def run(params):
        embeds = decoder.embed_tokens(SPEC, params["params"], TOKENS, dtype=jnp.bfloat16)
        return (
            module.apply(params, TOKENS, positions=POSITIONS)[0],
            module.apply(params, embeds=embeds, positions=POSITIONS)[0],
        )

    of_tokens, of_embeds = run(PARAMS)
    np.testing.assert_array_equal(
        np.asarray(of_tokens, np.float32), np.asarray(of_embeds, np.float32)
    )


def test_an_encoder_of_packed_texts_encodes_each_of_them_alone():
    @cases.compiled
    def run(params, tokens):
        def encode(tokens, positions, segments=None):
            return ENCODER.apply(
                params, tokens, positions=positions, segments=segments, bidirectional=True
            )[0]

        first, second = encode(tokens[:, :5], PACKED[:, :5]), encode(tokens[:, 5:], PACKED[:, 5:])
        return encode(tokens, PACKED, SEGMENTS), jnp.concatenate([first, second], 1)

    packed, alone = run(PARAMS, TOKENS)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_gradients_reach_the_embeddings_of_a_tokens_own_text_and_no_others():
    @cases.compiled
    def gradients(embeds):
        def score(embeds, token):
            hidden, _ = ENCODER.apply(
                PARAMS, embeds=embeds, positions=PACKED, segments=SEGMENTS, bidirectional=True
            )
            return (hidden[0, token] * jnp.arange(1.0, SPEC.width + 1)).sum()

        return jax.vmap(jax.grad(score), in_axes=(None, 0))(embeds, jnp.array([2, 8]))

    seen = np.abs(np.asarray(gradients(EMBEDS))[:, 0]).max(-1) > 0  # [2, T]
    np.testing.assert_array_equal(seen, np.asarray(SEGMENTS) == np.array([[0], [1]]))


def test_inputs_without_a_meaning_together_are_refused():
    def refused(match, *, module=ENCODER, **inputs):
        with pytest.raises(InputError, match=match):
            module.apply(PARAMS, positions=POSITIONS, **inputs)

    refused("neither tokens nor embeds are given; give one of the two")
    refused("both tokens and embeds are given", tokens=TOKENS, embeds=EMBEDS)
    refused("does not work with caches", tokens=TOKENS, caches=(), bidirectional=True)
    inputs = {"module": decoder.Decoder(SPEC, (Window(4), FULL)), "tokens": TOKENS}
    refused("does not work with window:window=4: every token", **inputs, bidirectional=True)
    sirllm = (SirLLM(capacity=8, sinks=1, recent=2, turn=4),) * 2
    inputs = {"module": decoder.Decoder(SPEC, sirllm), "embeds": EMBEDS}
    refused("sirllm:.* scores token ids, but embeds have none; give tokens", **inputs, caches=())


@pytest.mark.slow  # that packed texts are separate holds on one device in the fast lane
@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [("tensor", {"data": 2, "tensor": 2}), ("context", {"data": 2, "context": 4})],
)
def test_an_encoder_on_a_mesh_is_that_on_one_device(strategy, sizes):
    tokens, positions, segments = (jnp.tile(x, (2, 1)) for x in (TOKENS, PACKED, SEGMENTS))
    shape, rules = mesh.make(mesh.MeshShape(**{"data": 1, **sizes})), partition.parse(strategy)
    laid_out = ENCODER.clone(
        prefill=Sharded(shape, rules), constrain=partition.Constrain(shape, rules)
    )

    def encode(module, params):
        return module.apply(
            params, tokens, positions=positions, segments=segments, bidirectional=True
        )[0]

    alone = cases.compiled(functools.partial(encode, ENCODER))(PARAMS)
    with jax.set_mesh(shape):
        together = cases.compiled(functools.partial(encode, laid_out))(PARAMS)
    np.testing.assert_allclose(together, alone, atol=1e-5)
