"""Products with int8 and bfloat16 weights, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.models import layers, quantization

ROWS = (1, 3, 20)  # on a CPU one row, and few of the head, are products of their own


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def absmax(w, axis):
    """Rounded numbers and scales, channel by channel."""
    w = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1).astype(np.float64)
    scale = np.array([np.abs(channel).max() / 127 for channel in w.T])
    return np.round(w / scale), scale


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_with_int8_weights_is_that_of_the_formula(rows):
    x, w = normal(1, rows, 24), normal(24, 5, 6, seed=1)
    values, scale = absmax(w, 0)
    expected = (x[0].astype(np.float64) @ values * scale).reshape(1, rows, 5, 6)
    quantized = quantization.quantize(jnp.asarray(w), contracted=(0,))
    np.testing.assert_allclose(layers.matmul(jnp.asarray(x), quantized), expected, atol=2e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_over_two_axes_is_that_of_the_formula(rows):
    x, w = normal(1, rows, 4, 6), normal(4, 6, 10, seed=1)
    values, scale = absmax(w.reshape(24, 10), 0)
    expected = (x.reshape(rows, 24).astype(np.float64) @ values * scale)[None]
    quantized = quantization.quantize(jnp.asarray(w), contracted=(0, 1))
    found = layers.matmul(jnp.asarray(x), quantized, contract=2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_with_a_transposed_head_is_that_of_the_formula(rows):
    x, w = normal(rows, 24), normal(40, 24, seed=1)
    x[0] *= 1e-3  # rows have scales of their own
    x[-1, :12] = 0
    values, scale = absmax(w, 1)
    expected = x.astype(np.float64) @ values * scale
    quantized = quantization.quantize(jnp.asarray(w), contracted=(1,))
    found = layers.product(jnp.asarray(x), quantized, dtype=jnp.float32, transposed=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(x).max(1).mean() * 5)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-7)


def test_a_row_of_zeros_gives_zeros():
    w = quantization.quantize(jnp.zeros((40, 24)), contracted=(1,))
    found = layers.product(jnp.zeros((1, 24)), w, dtype=jnp.float32, transposed=True)
    np.testing.assert_array_equal(found, np.zeros((1, 40)))


@pytest.mark.parametrize("width", [24, 21])  # summed eight rows at a time, or fewer
def test_one_row_times_bfloat16_weights_is_the_product_in_float32(width):
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (normal(1, 1, width), normal(width, 3, 5)))
    expected = np.asarray(x[0], np.float64) @ np.asarray(w, np.float64).reshape(width, 15)
    found = np.asarray(layers.matmul(x, w), np.float64).reshape(1, 15)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)  # rounded once, at the end


def test_no_weight_is_further_off_than_half_a_scale():
    w = jnp.asarray(normal(3, 64, 7) * 10.0 ** np.arange(7))
    quantized = quantization.quantize(w, contracted=(1,))
    error = np.abs(np.asarray(w) - np.asarray(quantization.dequantize(quantized, jnp.float32)))
    assert (error <= np.asarray(quantized.scale) * 0.5001).all()
    assert quantized.qvalue.dtype == jnp.int8
    assert int(jnp.abs(quantized.qvalue).min(1).max()) <= 127 == int(quantized.qvalue.max())


def test_weights_that_are_not_numbers_are_not_hidden():
    w = jnp.asarray(normal(8, 3)).at[2, 1].set(jnp.nan)
    quantized = quantization.quantize(w, contracted=(0,))
    assert jnp.isnan(quantization.dequantize(quantized, jnp.float32)[:, 1]).all()


def test_one_row_reads_the_weights_as_they_are():
    """No float32 copy of them: temporary memory is that of partial sums."""
    w = quantization.quantize(jnp.asarray(normal(512, 256)), contracted=(0,))
    x = jax.ShapeDtypeStruct((1, 1, 512), jnp.float32)
    compiled = jax.jit(layers.matmul).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * w.size / 4
