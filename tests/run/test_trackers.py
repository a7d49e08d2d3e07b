"""TensorBoard and Weights & Biases, by stand-ins for their packages."""

import importlib.util
import sys
import types

import pytest

from lminf.errors import InputError
from lminf.run import trackers


@pytest.fixture
def said(monkeypatch):
    """What the stand-ins were told."""
    found = []

    class Writer:
        def __init__(self, folder):
            found.append(("open", folder))

        def add_scalar(self, name, value, step):
            found.append((name, value, step))

        def close(self):
            found.append(("close",))

    def init(**options):
        found.append(("open", options["id"], options["config"]))
        return types.SimpleNamespace(
            log=lambda values, step: found.append((values, step)),
            finish=lambda: found.append(("close",)),
        )

    modules = {
        "tensorboardX": types.SimpleNamespace(SummaryWriter=Writer),
        "wandb": types.SimpleNamespace(init=init),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: modules.get(name))
    return found


def test_tensorboard_is_shown_the_numbers(said, tmp_path):
    (watcher,) = trackers.opened("tensorboard", tmp_path, {})
    watcher.add(3, {"loss": 2.5, "grad_norm": None})
    watcher.close()
    assert said == [("open", str(tmp_path / "tensorboard")), ("loss", 2.5, 3), ("close",)]


def test_wandb_is_shown_the_numbers_and_the_config(said, tmp_path):
    (watcher,) = trackers.opened("wandb", tmp_path, {"steps": 2})
    watcher.add(3, {"loss": 2.5, "grad_norm": None})
    watcher.close()
    assert said == [("open", tmp_path.name, {"steps": 2}), ({"loss": 2.5}, 3), ("close",)]


def test_what_is_missing_or_unknown_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs wandb, .*pip install 'lminf\[watch\]'"):
        trackers.named("wandb, tensorboard")
    with pytest.raises(InputError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        trackers.named("tensorbord")
