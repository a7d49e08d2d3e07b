"""The small models of the tests of lminf.lm."""

from tests.lm.conftest import compile_quickly, lm, small_steps

__all__ = ["compile_quickly", "lm", "small_steps"]
