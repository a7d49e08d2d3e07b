"""Every golden of tests/goldens/ (see make.py there) through our importer and our decoder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import policy as policies
from lminf.attention import rope
from lminf.checkpoints.families import FAMILIES
from lminf.models import decoder, heads, layer_policies, layers

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = sorted(config.parent.name for config in GOLDENS.glob("*/config.json"))
FAMILY_OF = {
    case: json.loads((GOLDENS / case / "config.json").read_text())["model_type"] for case in CASES
}
# The first case of each family; the others are its variants.
FIRST = sorted({family: case for case, family in reversed(FAMILY_OF.items())}.values())
LOGITS = 2e-5  # absolute; logits are below 7, and transformers itself is 5e-6 from exact
HIDDEN = 5e-6  # of the largest value in the layer


def run(spec, params, tokens):
    """Logits, and the residual stream after each layer, under the model's own attention."""
    own = layer_policies.by_layer(
        policies.Full(), windows=spec.windows, num_kv_heads=spec.num_kv_heads
    )
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


def embedded(spec, params, tokens):
    """What the first layer reads."""
    x = params["embed"][tokens] * spec.embed_scale
    if spec.embed_norm:
        x = layers.Norm(spec.norm, spec.width).apply({"params": params["embed_norm"]}, x)
    if isinstance(spec.encoding, rope.Learnt):
        x = x + params["positions"][spec.encoding.offset :][: tokens.shape[1]][None]
    return x


# What each of these has, no other does: a kind of norm, residual, position, map or mixture. The
# rest runs in the slow lane.
FAST = {
    "bloom", "cohere2", "falcon", "gemma2", "gemma3", "gpt2", "gpt_neox", "gptj", "llama",
    "gpt_oss", "llama_llama3", "mistral", "mixtral", "mpt", "olmo2", "phi3", "qwen2", "qwen3",
    "stablelm_parallel",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_logits_and_hidden_states_equal_transformers(case):
    expected = np.load(GOLDENS / case / "expected.npz")
    loaded = checkpoints.load(str(GOLDENS / case))
    logits, stream = run(loaded.spec, loaded.params, expected["tokens"])
    found = [embedded(loaded.spec, loaded.params, expected["tokens"]), *stream]
    for layer, (ours, theirs) in enumerate(zip(found, expected["hidden"], strict=True)):
        ours = ours[: len(theirs)]
        error = abs(ours - theirs).max() / abs(theirs).max()
        assert error <= HIDDEN, f"layer {layer} (0 is the embedding): {error:.1e}"
    assert abs(logits - expected["logits"]).max() <= LOGITS


def test_every_family_has_a_golden():
    assert set(FAMILY_OF.values()) == set(FAMILIES)
