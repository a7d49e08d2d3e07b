"""Fixtures shared by the kernel tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes():
    """The package as users run it: no annotation checks in front of its own messages."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
