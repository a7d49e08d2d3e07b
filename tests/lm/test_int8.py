"""A model with int8 weights computes what it would with the same numbers in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policy import POLICIES, Full, LMInfinite, PerLayer
from lminf.errors import InputError
from lminf.lm import generate, layerwise
from lminf.lm.lm import LM
from lminf.models.quantization import QuantizedWeights, dequantize
from lminf.surgery.quantize import quantize
from tests.attention import cases, test_sparse
from tests.models import specs

TEXT = "Some forty bytes of text to be predicted."


def of_same_numbers(lm: LM) -> tuple[LM, LM]:
    """The model in int8, and with the numbers that those stand for in float32."""
    params = quantize(lm.params)
    floats = jax.tree.map(
        lambda w: dequantize(w, jnp.float32), params,
        is_leaf=lambda x: isinstance(x, QuantizedWeights),
    )  # fmt: skip
    return dataclasses.replace(lm, params=params), dataclasses.replace(lm, params=floats)


def test_losses_are_those_of_the_same_numbers_in_float32(lm):
    small, exact = of_same_numbers(lm.with_policy(Full()))
    np.testing.assert_allclose(small.nll(TEXT).token_nll, exact.nll(TEXT).token_nll, atol=1e-5)
    assert repr(small).startswith(f"LM of {repr(lm).split()[2]} parameters in int8 and float32")


@pytest.mark.slow
def test_written_tokens_are_those_that_reading_them_makes_likeliest(lm, small_steps):
    """One row at a time through the cache, and many rows at once, are different products."""
    small, _ = of_same_numbers(lm)
    written, ids = [], np.asarray(lm.tokenizer.encode(TEXT))
    for token in generate.generate_tokens(
        small, [ids], sampling=generate.GREEDY, max_new_tokens=6, key=jax.random.key(0)
    ):
        written.append(int(token[0]))
    read = small.logits([np.concatenate([ids, written[:-1]])], last=len(written))[0]
    assert read.argmax(-1).tolist() == written


@pytest.mark.slow
def test_layers_one_by_one_are_the_scan_and_the_mesh(lm, small_steps, monkeypatch):
    small, _ = of_same_numbers(lm)
    ids = lm.tokenizer.encode(TEXT)
    losses, answer = small.token_nll(ids), small.generate(TEXT, max_new_tokens=6)
    assert isinstance(small.forward, layerwise.LayerwiseDecoder)
    shared = small.with_devices(jax.devices()[:2])
    np.testing.assert_allclose(shared.token_nll(ids), losses, atol=1e-5)
    monkeypatch.setattr(layerwise, "PLATFORMS", ())
    scanned = dataclasses.replace(small)
    np.testing.assert_allclose(scanned.token_nll(ids), losses, atol=1e-5)
    assert scanned.generate(TEXT, max_new_tokens=6) == answer


@pytest.mark.slow
@pytest.mark.parametrize("family", [*specs.SPECS, "mixed"])
def test_every_kind_of_model_reads_int8(family):
    spec = specs.MIXED if family == "mixed" else specs.shallow(specs.SPECS[family], 2)
    small, exact = of_same_numbers(LM(spec, specs.parameters(spec), None))
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, 16)
    np.testing.assert_allclose(small.token_nll(ids), exact.token_nll(ids), atol=1e-5)


EVERY = {
    **{name: policy for name, policy in cases.POLICIES.items() if name in POLICIES},
    "per_head": cases.POLICIES["per_head_bounded"],
    "leaky_rerope": cases.POLICIES["leaky"],
    **test_sparse.POLICIES,
    "per_layer": PerLayer((LMInfinite(8, 2), Full())),
    "h2o": H2O(12, sinks=2, recent=2, turn=4),
    "tova": TOVA(12, turn=4),
    "sirllm": SirLLM(32, recent=8, turn=16),
    "snapkv": SnapKV(20, window=4),
    "think": ThinK(0.5, recent=5),
}


def test_every_policy_is_tried():
    assert {name: type(policy) for name, policy in EVERY.items()} == POLICIES


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_policy_reads_int8(lm, small_steps, name):
    small, exact = (model.with_policy(EVERY[name]) for model in of_same_numbers(lm))
    prompt = 32 if small.policy.name.startswith(("snapkv", "think")) else None
    found, expected = (model.nll(TEXT, prompt=prompt).token_nll for model in (small, exact))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_activations_over_int8_weights(lm, small_steps):
    small, exact = of_same_numbers(lm)
    half = dataclasses.replace(small, dtype=jnp.bfloat16)
    np.testing.assert_allclose(half.nll(TEXT).token_nll, exact.nll(TEXT).token_nll, atol=0.08)
    assert half.generate(TEXT, max_new_tokens=6)


def test_unknown_weights_name_the_nearest():
    with pytest.raises(InputError, match="weights=int4: did you mean 'int8'"):
        LM.from_pretrained("smollm2-135m-instruct", weights="int4")
