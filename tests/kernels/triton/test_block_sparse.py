"""Block-sparse attention in Triton: numbers from the interpreter."""

import pytest

from tests.kernels.triton import checks

pytestmark = pytest.mark.aot


def assert_within(errors, *, value, gradient):
    for name, error in errors.items():
        assert error <= (gradient if name.startswith("d_") else value), (name, error)


@pytest.mark.parametrize("name", checks.SPARSE)
def test_interpreted_numbers_are_those_of_the_reference(interpreter, name):
    assert_within(interpreter(name), value=2e-6, gradient=5e-6)


@pytest.mark.parametrize("name", checks.LOW_SPARSE)
def test_interpreted_numbers_in_low_precision(interpreter, name):
    tolerance = 1e-2 if "bfloat16" in name else 1e-3
    assert_within(interpreter(name), value=tolerance, gradient=max(tolerance, 2e-3))


def test_two_runs_are_equal(interpreter):
    assert not any(interpreter(checks.SPARSE_TWICE).values())
