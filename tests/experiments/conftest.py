import fcntl
import importlib
import os
import tempfile
from pathlib import Path

import jax
import pytest

from lminf import checkpoints
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
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model on disk, trained once for the tests of all workers: 90 s of processor time."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder lies in the one of the session
        shared = shared.parent
    folder = shared / "tiny_lm"
    with (shared / "tiny_lm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax
                lm = _models.train_tiny(seed=0)
            checkpoint = checkpoints.Checkpoint(lm.spec, lm.params, lm.tokenizer, "")
            checkpoints.save(str(folder), checkpoint)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder) -> LM:
    return LM.from_pretrained(str(tiny_folder), dtype="float32")


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
