"""The Pallas TPU interpreter: memory starts as NaN, races and reads outside of arrays are found."""

import contextlib

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(cores: int):
    pltpu.reset_tpu_interpret_mode_state()
    checks = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    with pltpu.force_tpu_interpret_mode(checks):
        yield
    # Which jax publishes under no other name; None: no kernel ran.
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


@pytest.fixture
def interpreter():
    """TPU kernels called by the test are interpreted; a data race in any of them fails it."""
    with interpreted(1):
        yield


@pytest.fixture
def two_cores():
    """The same on two cores, which share the parallel axes of a grid: six times slower."""
    with interpreted(2):
        yield
