"""The peers: torch and transformers, imported only by tests that ask for them."""

import importlib.util
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def peer():
    """The module tests/goldens/make.py. Missing torch or transformers is an error, not a skip."""
    location = importlib.util.spec_from_file_location("goldens_make", GOLDENS / "make.py")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    module.transformers.logging.set_verbosity_error()
    module.transformers.logging.disable_progress_bar()
    return module
