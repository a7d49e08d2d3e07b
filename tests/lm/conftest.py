import pytest

from lminf.attention.policy import Full, LMInfinite, PerLayer
from lminf.data.tokenizers import ByteTokenizer
from lminf.lm.lm import LM
from tests.models import specs


@pytest.fixture(scope="session")
def lm() -> LM:
    """A random byte model of two layers, one that forgets and one that does not."""
    spec = specs.change(specs.shallow(specs.LLAMA, 2), vocab_size=257)
    policy = PerLayer((LMInfinite(window=8, sinks=2), Full()))
    return LM(spec, specs.parameters(spec), ByteTokenizer(), policy)


@pytest.fixture
def small_steps(monkeypatch):
    """Texts of some twenty tokens are read in several chunks."""
    monkeypatch.setattr("lminf.lm.nll.CHUNK", 16)
    monkeypatch.setattr("lminf.lm.generate.STEP", 16)
