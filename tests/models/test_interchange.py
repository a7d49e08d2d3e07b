"""Interchange of hidden states: beside a loop over layers that swaps one state by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import attend
from lminf.attention.policy import FULL, Window
from lminf.errors import InputError
from lminf.models import decoder, layers
from lminf.models.interchange import interchange
from tests.attention import cases
from tests.models import specs

LAYERS, TOKENS = 2, 7
RANDOM = np.random.default_rng(0)
BASE, SOURCE = (
    jnp.asarray(RANDOM.integers(0, specs.LLAMA.vocab_size, (2, TOKENS)), jnp.int32)
    for _ in range(2)
)
POSITIONS = jnp.arange(TOKENS, dtype=jnp.int32)[None].repeat(2, 0)
PLACES = jnp.asarray([2, 5], jnp.int32)


def swapped_by_hand(spec, policies, params, layer):
    """Layer after layer over each text, with a swap of one state before layer number `layer`."""
    streams = [
        decoder.embed_tokens(spec, params, tokens, dtype=jnp.float32) for tokens in (BASE, SOURCE)
    ]
    configs = decoder.score_configs(spec)
    for index in range(spec.num_layers + 1):
        if index == layer:
            for row, place in enumerate(PLACES.tolist()):
                streams[0] = streams[0].at[row, place].set(streams[1][row, place])
        if index == spec.num_layers:
            break
        prefill = attend.prefill(policies[index], configs[index], POSITIONS)
        of_layer = jax.tree.map(lambda w, index=index: w[index], params["layers"])
        streams = [
            layers.Block(spec).apply(
                {"params": of_layer}, x, lambda q, k, v, run=prefill: (run(q, k, v), None)
            )[0]  # pyright: ignore[reportIndexIssue]
            for x in streams
        ]
    return layers.Norm(spec.norm, spec.width).apply({"params": params["final_norm"]}, streams[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "policies"), [(specs.LLAMA, (FULL, FULL)), (specs.GEMMA, (Window(3), FULL))],
    ids=("llama", "gemma, local and global layers"),
)  # fmt: skip
def test_states_are_exchanged_behind_every_layer(spec, policies):
    spec = specs.shallow(spec, LAYERS)
    params, module = specs.parameters(spec), decoder.Decoder(spec, policies)
    exchanged = cases.compiled(lambda params: interchange(module, params, BASE, SOURCE, PLACES))(
        params
    )
    assert exchanged.shape == (LAYERS + 1, 2, TOKENS, spec.width)
    expected = cases.compiled(
        lambda params: [swapped_by_hand(spec, policies, params, layer)
                        for layer in range(LAYERS + 1)]
    )(params)  # fmt: skip
    np.testing.assert_allclose(exchanged, np.stack(expected), atol=2e-6)
    # No two of them are alike, so a swap in a wrong layer would show.
    for layer in range(LAYERS):
        assert float(jnp.abs(exchanged[layer] - exchanged[layer + 1]).max()) > 1e-3


@pytest.mark.slow
def test_a_swap_of_embeddings_is_a_swap_of_tokens_and_none_changes_nothing():
    spec = specs.shallow(specs.LLAMA, LAYERS)
    params, module = specs.parameters(spec), decoder.Decoder(spec, (FULL, FULL))

    @cases.compiled
    def run(params):
        tokens = BASE.at[0, 2].set(SOURCE[0, 2]).at[1, 5].set(SOURCE[1, 5])
        return (
            interchange(module, params, BASE, SOURCE, PLACES)[0],
            module.apply({"params": params}, tokens, positions=POSITIONS)[0],
            interchange(module, params, BASE, SOURCE, jnp.full(2, -1, jnp.int32)),
            module.apply({"params": params}, BASE, positions=POSITIONS)[0],
        )

    first, tokens_swapped, none, plain = run(params)
    np.testing.assert_allclose(first, tokens_swapped, atol=2e-6)
    np.testing.assert_allclose(none, np.stack([plain] * (LAYERS + 1)), atol=2e-6)


def test_experts_are_refused():
    mixed = decoder.Decoder(specs.MIXED, (FULL,) * specs.MIXED.num_layers)
    with pytest.raises(InputError, match="give a model without experts"):
        interchange(mixed, {}, BASE, SOURCE, PLACES)
