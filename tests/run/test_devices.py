"""What JAX is told before it computes."""

import warnings

import jax
import jax.experimental.compilation_cache.compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.run import devices


@pytest.fixture
def settings(monkeypatch):
    """jax.config as it was before."""
    monkeypatch.setattr(devices, "WORTH_KEEPING", 0.0)
    names = ("dir", "max_size")
    before = {f"jax_compilation_cache_{name}": None for name in names}
    before = {name: getattr(jax.config, name) for name in before}
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def compile_anew():
    jax.clear_caches()
    return jax.jit(lambda x: x * 3 + 7)(jnp.arange(5))


def test_programs_are_kept_and_a_damaged_one_is_compiled_again(settings, tmp_path):
    devices.configure(tmp_path)
    compile_anew()
    kept = sorted(tmp_path.glob("*-cache"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    np.testing.assert_array_equal(compile_anew(), [7, 10, 13, 16, 19])


def test_a_folder_that_the_user_chose_stays(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    devices.configure(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    devices.configure(None)
    assert jax.config.jax_compilation_cache_dir is None
