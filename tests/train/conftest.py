import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_run_it():
    """optax mixes dtypes and ranks, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
