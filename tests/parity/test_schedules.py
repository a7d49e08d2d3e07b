"""Rotary schedules and ALiBi slopes against transformers' own functions for them.

transformers computes frequencies in float32, so they are good to a few units in its last place.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import rope

pytestmark = pytest.mark.parity

RELATIVE = 1e-6  # a float32 power is off by several units of 6e-8

SCHEDULES = {
    "linear": (
        {"rope_type": "linear", "factor": 3.0},
        rope.Linear(factor=3.0),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rope.Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, trained_length=8192),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        rope.YaRN(factor=16.0, trained_length=4096),
    ),
    "yarn with everything set": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
            "truncate": False,
        },
        rope.YaRN(
            factor=4.0,
            trained_length=2048,
            beta_fast=20.0,
            beta_slow=2.0,
            attention_factor=1.3,
            truncate=False,
        ),
    ),
    # mscale and mscale_all_dim are a ratio of temperatures, which an importer can work out.
    "yarn with mscale": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
        },
        rope.YaRN(
            factor=40.0,
            trained_length=4096,
            attention_factor=(0.07 * np.log(40.0) + 1) / (0.11 * np.log(40.0) + 1),
        ),
    ),
    "yarn by 1": (
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
        rope.YaRN(factor=1.0, trained_length=4096),
    ),
}


def peer_schedule(peer, parameters, *, base, dim, length=None):
    """Frequencies and temperature as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = peer.transformers.LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": base, **parameters},
    )
    frequencies, temperature = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    return frequencies.numpy(), temperature


@pytest.mark.parametrize(("base", "dim"), [(10_000.0, 64), (500_000.0, 128), (1_000_000.0, 10)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_transformers(peer, name, base, dim):
    parameters, ours = SCHEDULES[name]
    frequencies, temperature = peer_schedule(peer, parameters, base=base, dim=dim)
    np.testing.assert_allclose(ours.frequencies(base, dim), frequencies, rtol=RELATIVE)
    assert ours.temperature == pytest.approx(temperature, rel=1e-12)


@pytest.mark.parametrize("length", [100, 4096, 4097, 5000, 70_000])
def test_dynamic_ntk_follows_the_length_like_transformers(peer, length):
    ours = rope.DynamicNTK(alpha=2.5, trained_length=4096)
    parameters = {"rope_type": "dynamic", "factor": 2.5}
    theirs, _ = peer_schedule(peer, parameters, base=10_000.0, dim=64, length=length)
    found = jax.jit(lambda n: ours.frequencies_at(10_000.0, 64, n))(jnp.int32(length))
    # Ours is the exponential of a float32 logarithm near 10: a few more units are lost.
    np.testing.assert_allclose(found, theirs, rtol=5 * RELATIVE)


def test_rotation_of_half_pairs_equals_transformers(peer):
    from transformers.models.llama import modeling_llama

    torch = peer.torch
    config = peer.transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )
    positions = np.array([[0, 1, 2, 77, 1000]])
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 64)).astype(np.float32)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(
        torch.zeros(1), torch.from_numpy(positions)
    )
    theirs, _ = modeling_llama.apply_rotary_pos_emb(
        torch.from_numpy(x), torch.from_numpy(x), cos, sin, unsqueeze_dim=2
    )
    ours = rope.Rotary(base=700.0, dim=64, layout="half")
    found = rope.rotate(jnp.asarray(x), rope.rotation(ours, jnp.asarray(positions)), "half")
    np.testing.assert_allclose(found, theirs.numpy(), atol=2e-4)  # their angle: 1000 * 6e-8


def test_rotation_of_interleaved_pairs_equals_transformers(peer):
    from transformers.models.gptj import modeling_gptj

    torch = peer.torch
    x = np.random.default_rng(0).normal(size=(1, 50, 2, 8)).astype(np.float32)
    sin, cos = modeling_gptj.create_sinusoidal_positions(50, 8)[None].split(4, dim=-1)
    theirs = modeling_gptj.apply_rotary_pos_emb(torch.from_numpy(x), sin, cos)
    ours = rope.Rotary(base=10_000.0, dim=8, layout="interleaved")
    found = rope.rotate(jnp.asarray(x), rope.rotation(ours, jnp.arange(50)[None]), "interleaved")
    np.testing.assert_allclose(found, theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 32, 40])
def test_alibi_slopes_equal_transformers(peer, heads):
    from transformers.models.mpt import modeling_mpt

    # The bias of the key one back, negated.
    theirs = -modeling_mpt.build_mpt_alibi_tensor(heads, 2)[:, 0, 0].numpy()
    np.testing.assert_allclose(rope.Alibi(max_bias=8.0).slopes(heads), theirs, rtol=RELATIVE)
