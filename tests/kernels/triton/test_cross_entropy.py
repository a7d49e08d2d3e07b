"""The linear cross-entropy in Triton: numbers from the interpreter."""

import pytest

from tests.kernels.triton import checks

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", checks.LOSS)
def test_interpreted_numbers_are_those_of_the_reference(interpreter, name):
    for result, error in interpreter(name).items():
        assert error <= (5e-6 if result.startswith("d_") else 2e-6), (result, error)


@pytest.mark.parametrize("name", checks.LOW_LOSS)
def test_interpreted_numbers_in_low_precision(interpreter, name):
    tolerance = 1e-2 if "bfloat16" in name else 1e-3
    for result, error in interpreter(name).items():
        assert error <= tolerance, (result, error)


def test_filtering_moves_gradients_by_no_more_than_the_skipped_mass(interpreter):
    for result, share in interpreter(checks.FILTER).items():
        assert share < 1, (result, share)


def test_two_deterministic_runs_are_equal(interpreter):
    assert not any(interpreter(checks.TWICE).values())
