import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_run_it():
    """optax mixes dtypes and ranks, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="package", autouse=True)
def compiled_fast():
    """Much is compiled and little computed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
