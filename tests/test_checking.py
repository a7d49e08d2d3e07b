"""The annotated shapes are assertions while tests run; needs beartype, of the `dev` extra."""

import jax.numpy as jnp
import jaxtyping
import pytest

from lminf.attention import cache


def test_a_wrong_shape_is_an_error():
    stored, slots = jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 1), jnp.int32)
    assert cache.write_pos(stored, slots, slots).shape == (2, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="pos"):
        cache.write_pos(stored, slots[:1], slots)
