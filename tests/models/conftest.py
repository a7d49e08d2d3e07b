import jax
import numpy as np
import pytest

from tests.models.test_moe import WIDTH, experts


@pytest.fixture(scope="package")
def x():
    """Inputs [2, 6, WIDTH] of a mixture of experts."""
    return np.random.default_rng(1).normal(size=(2, 6, WIDTH)).astype(np.float32)


@pytest.fixture(scope="package")
def params(x):
    """Random parameters of `experts()`."""
    shapes = jax.eval_shape(experts().init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * WIDTH**-0.5).astype(np.float32), shapes
    )
