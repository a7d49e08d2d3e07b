"""Rotations to 1e-6 at any position, and both branches' distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.common import rope

BASE, WIDTH = 10000.0, 16


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_angles_are_good_to_1e_6_at_16_million():
    rng = np.random.default_rng(0)
    edges = [0, 1, 4095, 4096, 131071, rope.LIMIT - 1]
    positions = np.concatenate([edges, rng.integers(0, rope.LIMIT, 500)])
    cos, sin = rope.angles(jnp.asarray(positions)[None], base=BASE, width=128)
    exact = positions[:, None] * BASE ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(cos[0], np.cos(exact), atol=1e-6, rtol=0)
    np.testing.assert_allclose(sin[0], np.sin(exact), atol=1e-6, rtol=0)


def test_scores_depend_on_true_and_on_capped_distances():
    """The local score is that of the distance; the global one that of L, wherever the keys are."""
    q, k = normal(0, 1, 9, 4, WIDTH), normal(1, 1, 9, 2, WIDTH)
    near = jnp.arange(9)[None]
    options = {"base": BASE, "num_global": 3, "clip_distance": 5}
    turn = jax.jit(lambda positions: kernels.rope_lambda(q, k, positions, **options))
    here, there = turn(near), turn(near + 9_000_000)

    def scores(query, key):
        return np.einsum("btnh,bskh->tsnk", query, key)

    np.testing.assert_allclose(
        scores(here.q_local, here.k_local), scores(there.q_local, there.k_local), atol=2e-5
    )
    np.testing.assert_array_equal(here.q_global, there.q_global)
    np.testing.assert_array_equal(here.k_global, k[:, :3])
    # Row 6 stands 5 after row 1: there both branches say the same.
    local = scores(here.q_local, here.k_local)[6, 1]
    np.testing.assert_allclose(scores(here.q_global, here.k_global)[6, 1], local, atol=1e-5)
    options["clip_distance"] = None
    plain = jax.jit(lambda positions: kernels.rope_lambda(q, k, positions, **options))(near)
    np.testing.assert_array_equal(plain.k_global, plain.k_local[:, :3])


@pytest.mark.parametrize("position", [-1, rope.LIMIT])
def test_positions_past_the_tables(position):
    """An error that names them; inside jit, where there can be none, NaN."""
    positions = jnp.array([[0, position]])
    with pytest.raises(ValueError, match="positions run from"):
        rope.angles(positions, base=BASE, width=8)
    cos, _ = jax.jit(lambda p: rope.angles(p, base=BASE, width=8))(positions)
    assert np.isfinite(cos[0, 0]).all()
    assert np.isnan(cos[0, 1]).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": jnp.zeros((1, 9, 2, 8))}, "k has shape"),
        ({"positions": jnp.arange(9)}, "positions has shape"),
        ({"clip_distance": 0}, "clip_distance"),
        ({"num_global": -1}, "num_global"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(change, word):
    given = {"q": normal(0, 1, 9, 4, WIDTH), "k": normal(1, 1, 9, 2, WIDTH)}
    options = {"positions": jnp.arange(9)[None], "num_global": 3, "clip_distance": 5}
    with pytest.raises(ValueError, match=word):
        kernels.rope_lambda(**(given | options | {"base": BASE} | change))
