import importlib
import tempfile
from pathlib import Path

import jax
import pytest

from lminf.data.tokenizers import ByteTokenizer
from lminf.experiments import _models
from lminf.lm.lm import LM
from lminf.models import spec
from lminf.run import folder, request
from tests.models import specs


@pytest.fixture(scope="session")
def random_lm() -> LM:
    return small_lm()


def small_lm() -> LM:
    """A byte model of the tiny one's form but two narrow layers, not trained."""
    shape = spec.llama(
        vocab_size=257, width=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48,
        trained_length=64,
    )  # fmt: skip
    return LM(shape, specs.parameters(shape), ByteTokenizer())


@pytest.fixture(scope="session")
def tiny_lm() -> LM:
    """The tiny model, trained once for all tests: under a minute on two cores."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        return _models.train_tiny(seed=0)


@pytest.fixture
def rows_of(random_lm, monkeypatch, tmp_path):
    """`rows_of(name, before, field=value, …)`: what the experiment's tiny form measures of that
    model, in a folder that holds the rows `before`.
    """
    monkeypatch.setattr(_models, "load", lambda *_, **__: random_lm)

    def measure(name, before=(), **fields):
        config = request.parse(name, [f"--config={name}:tiny"]).config
        config.update(fields)
        out = folder.RunFolder(Path(tempfile.mkdtemp(dir=tmp_path)))
        for row in before:
            out.append_row(row)
        return list(importlib.import_module(f"lminf.experiments.{name}").run(config, out))

    return measure
