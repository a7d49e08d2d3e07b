"""Λ-decoding in Triton: numbers from the interpreter."""

import pytest

from tests.kernels.triton import checks

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", checks.DECODE)
def test_interpreted_numbers_are_those_of_the_reference(interpreter, name):
    for result, error in interpreter(name).items():
        assert error <= (5e-6 if result.startswith("d_") else 2e-6), (result, error)


@pytest.mark.parametrize("name", checks.LOW_DECODE)
def test_interpreted_numbers_in_low_precision(interpreter, name):
    for result, error in interpreter(name).items():
        assert error <= 1e-2, (result, error)
