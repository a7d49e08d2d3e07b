"""XLA's programs for an H100, compiled without one: what they would hold in memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lminf import kernels
from lminf.kernels.common import aot


@pytest.fixture
def on_gpu(monkeypatch):
    """Choices that depend on the platform are made as on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_linear_cross_entropy_never_holds_the_logits(on_gpu):
    """Loss and gradients at N=8192, D=2304, V=256000; the dense form takes 12.58 GB."""
    tokens, width, vocab = 8192, 2304, 256000
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    ]

    def loss(embeddings, classifier, labels):
        return kernels.linear_cross_entropy(
            embeddings, classifier, labels, implementation="xla_chunked"
        )

    compiled = aot.compile_gpu(jax.value_and_grad(loss, (0, 1)), *shapes)
    text = compiled.as_text()
    assert f"[{tokens},{vocab}]" not in text
    assert f"[{vocab},{tokens}]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes <= 300e6


def test_lambda_attention_memory_is_linear(on_gpu):
    """xla_chunked forward: copies of queries, keys and values in tile order, and little else."""

    def temp_bytes(length):
        shapes = [
            jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)
        ]
        attend = functools.partial(
            kernels.lambda_attention, num_global=100, window_size=4096,
            implementation="xla_chunked",
        )  # fmt: skip
        return aot.compile_gpu(attend, *shapes).memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(16384), temp_bytes(32768)
    assert long <= 2.02 * short
    inputs = 32768 * (32 + 8 + 8) * 128 * 2
    assert long <= 4 * inputs
