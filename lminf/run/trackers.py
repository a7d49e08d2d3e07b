"""TensorBoard and Weights & Biases, for who wants to watch a run there. metrics.jsonl is the truth.

Neither is needed or imported unless a config asks for it; both come with the extra `watch`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lminf.config import closest
from lminf.errors import InputError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows the numbers of a step; what is None is left out."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir runs."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        del config
        self._writer = importlib.import_module(PACKAGES["tensorboard"]).SummaryWriter(
            str(folder / "tensorboard")
        )

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project `lminf`, named like the folder; continued when the folder is."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self._run = importlib.import_module(PACKAGES["wandb"]).init(
            project="lminf", name=folder.name, id=folder.name, resume="allow", dir=str(folder),
            config=dict(config),
        )  # fmt: skip

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def named(text: str) -> list[str]:
    """The names between commas; a name that is none, or lacks its package, is refused."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"there is no tracker {name!r}; {closest(name, TRACKERS)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"--config.watch={name} needs {PACKAGES[name]}, which is not installed: "
                f"pip install 'lminf[watch]'"
            )
    return names


def opened(text: str, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The named watchers of a run's folder."""
    return [TRACKERS[name](folder, config) for name in named(text)]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
