"""The small models of the tests of lminf.lm."""

from tests.lm.conftest import lm, small_steps

__all__ = ["lm", "small_steps"]
