"""Every golden of tests/goldens/ (see make.py there) through our importer and our decoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import policy as policies
from lminf.models import decoder, heads

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = sorted(config.parent.name for config in GOLDENS.glob("*/config.json"))
LOGITS = 2e-5  # absolute; logits are below 7, and transformers itself is 5e-6 from exact
HIDDEN = 5e-6  # of the largest value in the layer


def run(spec, params, tokens):
    """Logits, and the residual stream after each layer, under the model's own attention."""
    own = policies.by_layer(policies.Full(), windows=spec.windows, num_kv_heads=spec.num_kv_heads)
    model = decoder.Decoder(spec, own)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def forward(params):
        (hidden, _), sown = model.apply(
            {"params": params}, tokens, positions=positions, mutable=["intermediates"]
        )
        (stream,) = sown["intermediates"]["layers"]["hidden"]
        return heads.lm(spec, params, hidden), stream

    # Each case is compiled once and run once: an optimised program would not pay for itself.
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(forward).lower(params).compile(compiler_options=quickly)(params)


# One of each architecture; their variants run in the slow lane.
FAST = {"gemma2", "gpt_neox", "gptj", "llama", "llama_llama3", "mistral", "mpt", "qwen2", "qwen3"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_logits_and_hidden_states_equal_transformers(case):
    expected = np.load(GOLDENS / case / "expected.npz")
    loaded = checkpoints.load(str(GOLDENS / case))
    logits, stream = run(loaded.spec, loaded.params, expected["tokens"])
    embedded = loaded.params["embed"][expected["tokens"]] * loaded.spec.embed_scale
    found = [embedded, *stream]
    for layer, (ours, theirs) in enumerate(zip(found, expected["hidden"], strict=True)):
        error = abs(ours - theirs).max() / abs(theirs).max()
        assert error <= HIDDEN, f"layer {layer} (0 is the embedding): {error:.1e}"
    assert abs(logits - expected["logits"]).max() <= LOGITS


def test_every_family_has_a_golden():
    families = {checkpoints.load(str(GOLDENS / case)).spec.family for case in CASES}
    assert families == {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gptj", "mpt",
    }  # fmt: skip
