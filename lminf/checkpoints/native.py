"""Training state on disk: written in the background, whole or not there, read onto any mesh.

One folder a checkpoint, named by its step. What Orbax writes is complete once `manifest.json`
stands beside it: the step, the loss it was judged by, facts about the run, and every file's size
and checksum. A folder without one was interrupted, and counts as nothing. (Orbax's v1 interface,
whose place and names may still move, is used in this module only.)
"""

import json
import logging
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from lminf.errors import InputError
from lminf.parallel import partition

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes read at a time


def _said_once(record: logging.LogRecord) -> bool:
    """Whether a log record is news: Orbax logs a background error, then `result()` raises it."""
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


logging.getLogger("absl").addFilter(_said_once)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    path: epath.Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def loss(self) -> float | None:
        return self.manifest["loss"]

    def damage(self) -> str | None:
        """What is wrong with its files; None if nothing is."""
        for name, (size, checksum) in self.manifest["files"].items():
            file = self.path / name
            if not file.exists():
                return f"{name} is missing"
            if (found := file.stat().length) != size:
                return f"{name} has {found} bytes, not {size}"
            if _checksum(file) != checksum:
                return f"the bytes of {name} have changed"
        return None


class Store:
    """The checkpoints of one run. Every process calls the same methods in the same order.

    Keeps the latest `last`, and the one with the lowest loss if any was saved with a loss.
    """

    def __init__(self, folder: str, *, last: int, facts: Mapping[str, Any] | None = None):
        if last < 1:
            raise InputError(f"keeping the last {last} checkpoints keeps none; give at least 1")
        self.folder, self.last, self.facts = epath.Path(folder), last, dict(facts or {})
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *failure) -> None:
        self.wait()

    def saved(self) -> list[Saved]:
        """Complete checkpoints, the oldest first."""
        if not self.folder.exists():
            return []
        found = []
        for path in self.folder.iterdir():
            manifest = _read_manifest(path / MANIFEST)
            if manifest is not None:
                found.append(Saved(path, manifest))
        return sorted(found, key=lambda saved: saved.step)

    def save(self, step: int, state: Any, *, loss: float | None = None) -> None:
        """Copies the state and returns; it is written in the background. The state may change."""
        self.wait()
        path = self.folder / f"{step:08d}"
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_what_is_not(self.saved(), but=step)
            writing = ocp.save_async(path, _flat(state), overwrite=True)
        except (OSError, ValueError) as error:
            if (explained := self._explained(path, error)) is error:
                raise
            raise explained from error
        self._finishing = threading.Thread(target=self._finish, args=(writing, path, step, loss))
        self._finishing.start()

    def wait(self) -> None:
        """Returns when the last save is complete; raises what went wrong with it."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, abstract: Any, *, report: Callable[[str], None]) -> tuple[int, Any] | None:
        """Step and state of the latest whole checkpoint; None if none was ever completed.

        `abstract` holds the shape, dtype and sharding of every array: what was saved on another
        mesh is laid out anew. Damaged ones are reported by name and passed over.
        """
        checkpoints = self.saved()
        for saved in reversed(checkpoints):
            damage = saved.damage()
            if damage is None:
                return saved.step, load(saved.path, abstract)
            report(f"checkpoint {saved.path} is damaged ({damage}); trying the one before it")
        if checkpoints:
            raise InputError(
                f"all {len(checkpoints)} checkpoints in {self.folder} are damaged; restore them "
                f"from a copy, or delete the folder to begin again"
            )
        return None

    def best(self) -> Saved | None:
        """The complete checkpoint with the lowest loss."""
        judged = [saved for saved in self.saved() if saved.loss is not None]
        return min(judged, key=lambda saved: saved.loss or 0.0, default=None)

    # --- In the background ------------------------------------------------------------------------

    def _finish(self, writing, path: epath.Path, step: int, loss: float | None) -> None:
        try:
            writing.result()
            if jax.process_index() == 0:
                files = {
                    str(file.relative_to(path)): (file.stat().length, _checksum(file))
                    for file in _files(path)
                }
                manifest = {"step": step, "loss": loss, **self.facts, "files": files}
                unfinished = path / f"{MANIFEST}.writing"
                unfinished.write_text(json.dumps(manifest, indent=1))
                unfinished.rename(path / MANIFEST)
                self._prune()
        except BaseException as error:  # shown to whoever waits: a thread has no other way
            self._failure = self._explained(path, error)

    def _prune(self) -> None:
        kept = {saved.step for saved in self.saved()[-self.last :]}
        best = self.best()
        for saved in self.saved():
            if saved.step not in kept and (best is None or saved.step != best.step):
                (saved.path / MANIFEST).unlink()  # first, so that half a folder is none
                saved.path.rmtree()

    def _remove_what_is_not(self, complete: list[Saved], *, but: int) -> None:
        """Deletes what interrupted saves left, and what is to be written anew."""
        keep = {saved.path.name for saved in complete if saved.step != but}
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in keep:
                path.rmtree()

    def _explained(self, path: epath.Path, error: BaseException) -> BaseException:
        """One sentence where the disk refused; else the error as it is."""
        # TensorStore reports what the system says as "...: REASON [os_error_code='28']".
        told = re.search(r"([^:]+) \[os_error_code=", str(error))
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif told:
            reason = told[1].strip()
        else:
            return error
        return InputError(
            f"cannot save {path}: {reason}; free some space or name another folder, and start "
            f"again: the checkpoint before it is whole"
        )


def load(path, abstract: Any) -> Any:
    """The state in a checkpoint's folder, laid out as `abstract` says."""
    flat = _flat(abstract)
    with warnings.catch_warnings():
        # Orbax says that it lays arrays out anew, which is what was asked for.
        warnings.filterwarnings("ignore", module="orbax")
        found = ocp.load(path, flat)
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in flat])


def _flat(tree: Any) -> dict[str, Any]:
    """The arrays by name, in the tree's order: nothing on disk depends on classes of optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {partition.path_of(key_path).replace("/", "."): leaf for key_path, leaf in leaves}


def _read_manifest(path: epath.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none, or half of one: the checkpoint was not completed
        return None


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _checksum(path: epath.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
