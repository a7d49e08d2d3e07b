"""Training state on disk: written in the background, whole or not there, read onto any mesh.

The folder of one run's checkpoints holds

    run.json              the settings of the run that it belongs to
    lock                  held by the process that writes here
    00000100/             the state after 100 steps: what Orbax writes, and then manifest.json
    00000200.incomplete   step 200 is being written or removed: what lies under its name is no use
    00000100.damaged      what stood in the way of a new checkpoint; left to the user

and nothing else: what this program did not write, it neither deletes nor writes over. A checkpoint
is complete once its manifest stands beside it; what an interrupted save left is known by the
`.incomplete` file, which is there before Orbax begins, and only that is deleted. (Orbax's v1
interface, whose names may still move, is used in this module only.)
"""

import contextlib
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from lminf.checkpoints import manifest
from lminf.checkpoints.manifest import Saved
from lminf.errors import InputError
from lminf.parallel import partition

SETTINGS, LOCK = "run.json", "lock"
STEP = re.compile(r"[0-9]{8}|[1-9][0-9]{8,}")
INCOMPLETE, DAMAGED = ".incomplete", ".damaged"
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax adds to a name until it has written everything
# What Orbax puts into the folder of a checkpoint; a folder with anything else is not touched.
ORBAX = re.compile(r"_\w+|orbax\.checkpoint|commit_success\.txt|descriptor|state|pytree")
METADATA = "_CHECKPOINT_METADATA"
NAMED = 5  # unknown names that a message lists


def _said_once(record: logging.LogRecord) -> bool:
    """Whether a log record is news: Orbax logs a background error, then `result()` raises it."""
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


logging.getLogger("absl").addFilter(_said_once)


class Store:
    """The checkpoints of one run. Every process calls the same methods in the same order.

    Keeps the latest `last`, and the one with the lowest loss if any was saved with a loss.
    """

    def __init__(self, folder: str, *, last: int, facts: manifest.Facts | None = None):
        if last < 1:
            raise InputError(f"keeping the last {last} checkpoints keeps none; give at least 1")
        self.folder, self.last, self.facts = epath.Path(folder), last, dict(facts or {})
        try:
            self.folder.exists()
        except ImportError as error:  # the file system of gs:// or s3:// is a package of its own
            raise InputError(
                f"{folder} needs a package that is not installed ({error}); install it, or name "
                f"another folder"
            ) from None
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *failure) -> None:
        self.wait()

    # --- Whose folder it is -----------------------------------------------------------------------

    def check_folder(self) -> None:
        """Refuses a folder that holds anything but checkpoints, before something is written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder; name another one for checkpoints")
        unknown = self._unknown()
        if unknown:
            more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
            raise InputError(
                f"{self.folder} holds {', '.join(unknown[:NAMED])}{more}, which is no checkpoint "
                f"that this program wrote; move it away, or name another folder for checkpoints"
            )

    def settings(self) -> Any:
        """The settings of the run that the folder belongs to; None if it is nobody's yet."""
        path = self.folder / SETTINGS
        if path.exists():
            return _settings(path) if manifest.is_file(path) else None
        # Written by a version that kept them in manifests only.
        for saved in reversed(self.saved()):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                settings = json.loads(saved.facts["config"] or "")
                return settings if isinstance(settings, dict) else None
        return None

    def own(self, settings: Mapping[str, Any]) -> None:
        """Writes down whose folder it is, which also shows that it can be written."""
        path = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f"{SETTINGS}.writing"
            unfinished.write_text(json.dumps({"program": "lminf", "config": settings}, indent=1))
            unfinished.replace(path)
        except OSError as error:
            raise self._explained(path, error) from error

    def _unknown(self) -> list[str]:
        """Names in the folder that this program did not put there."""
        if not self.folder.exists():
            return []
        ours = self.settings() is not None
        return sorted(path.name for path in self.folder.iterdir() if not self._known(path, ours))

    def _known(self, path: epath.Path, ours: bool) -> bool:
        """Whether this program made it; `ours` says that the folder has been used by a run."""
        name = path.name
        if os.path.islink(path):
            return False
        if name in (LOCK, f"{SETTINGS}.writing"):
            return manifest.is_file(path)
        if name == SETTINGS:
            return manifest.is_file(path) and _settings(path) is not None
        if (step := name.removesuffix(INCOMPLETE)) != name:
            return bool(STEP.fullmatch(step)) and manifest.is_file(path)
        base, damaged, _ = name.partition(DAMAGED)
        if damaged:
            return bool(STEP.fullmatch(base)) and path.is_dir() and ours
        base, temporary, _ = name.partition(TEMPORARY)
        if not STEP.fullmatch(base) or not path.is_dir():
            return False
        if not temporary and (path / manifest.NAME).exists():
            return True
        marked = _marker(self.folder / base).exists()
        return (marked or ours) and _only_orbax(path) and (bool(temporary) or _filled(path))

    # --- Writing and reading ----------------------------------------------------------------------

    def saved(self) -> list[Saved]:
        """Completed checkpoints, damaged ones too, the oldest first."""
        if not self.folder.exists():
            return []
        steps = [path for path in self.folder.iterdir() if STEP.fullmatch(path.name)]
        steps = [path for path in steps if path.is_dir() and not os.path.islink(path)]
        manifests = [manifest.read(path) for path in steps]
        return sorted((saved for saved in manifests if saved), key=lambda saved: saved.step)

    def save(self, step: int, state: Any, *, loss: float | None = None) -> None:
        """Copies the state and returns; it is written in the background. The state may change."""
        self.wait()
        path = self.folder / f"{step:08d}"
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_interrupted()
                self._make_room(path)
            writing = ocp.save_async(path, _flat(state))
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
        judged = [saved for saved in self._believed() if saved.loss is not None]
        return min(judged, key=lambda saved: saved.loss or 0.0, default=None)

    def _believed(self) -> list[Saved]:
        """Those whose manifests are as they should be."""
        return [saved for saved in self.saved() if saved.problem is None]

    # --- In the background ------------------------------------------------------------------------

    def _finish(self, writing, path: epath.Path, step: int, loss: float | None) -> None:
        try:
            writing.result()
            if jax.process_index() == 0:
                manifest.write(path, step=step, loss=loss, facts=self.facts)
                _marker(path).unlink()
                self._prune()
        except BaseException as error:  # shown to whoever waits: a thread has no other way
            self._failure = self._explained(path, error)

    def _prune(self) -> None:
        """Removes the checkpoints that are not kept, except where somebody has put a file."""
        believed, best = self._believed(), self.best()
        kept = {saved.step for saved in believed[-self.last :]} | ({best.step} if best else set())
        for saved in believed:
            known_files = {*saved.files, manifest.NAME}
            names = {str(file.relative_to(saved.path)) for file in manifest.files_in(saved.path)}
            if saved.step not in kept and names <= known_files:
                _marker(saved.path).touch()
                (saved.path / manifest.NAME).unlink()
                saved.path.rmtree()
                _marker(saved.path).unlink()

    def _remove_interrupted(self) -> None:
        """Deletes what interrupted saves and removals left."""
        for marker in [path for path in self.folder.iterdir() if path.name.endswith(INCOMPLETE)]:
            name = marker.name.removesuffix(INCOMPLETE)
            if not STEP.fullmatch(name):
                continue
            left = [self.folder / name, *self.folder.glob(f"{name}{TEMPORARY}*")]
            left = [path for path in left if path.exists() or os.path.islink(path)]
            completed = (self.folder / name / manifest.NAME).exists()
            for path in left[1:] if completed else left:
                if os.path.islink(path) or not path.is_dir() or not _only_orbax(path):
                    raise InputError(
                        f"{path} holds files that this program did not write; move it away"
                    )
                path.rmtree()
            marker.unlink()
        for path in [path for path in self.folder.iterdir() if TEMPORARY in path.name]:
            base = path.name.partition(TEMPORARY)[0]
            if STEP.fullmatch(base) and not os.path.islink(path) and path.is_dir():
                path.rename(self._aside(base))

    def _aside(self, name: str) -> epath.Path:
        """A free name for what stands in the way and was not marked as incomplete."""
        names = (self.folder / f"{name}{DAMAGED}{suffix}" for suffix in _suffixes())
        return next(path for path in names if not path.exists())

    def _make_room(self, path: epath.Path) -> None:
        """Clears the name of a new checkpoint. One that is there was found damaged, and is renamed;
        whatever else is there is somebody's."""
        if path.exists() or os.path.islink(path):
            completed = path.is_dir() and ((path / manifest.NAME).exists() or _filled(path))
            if os.path.islink(path) or not completed:
                raise InputError(
                    f"{path} is in the place of a new checkpoint, and this program did not write "
                    f"it; move it away, or name another folder for checkpoints"
                )
            path.rename(self._aside(path.name))
        _marker(path).touch()

    def _explained(self, path: epath.Path, error: BaseException) -> BaseException:
        """One sentence where the disk refused; else the error as it is."""
        # TensorStore reports what the system says as "...: REASON [os_error_code='28']".
        code = re.search(r"([^:]+) \[os_error_code=", str(error))
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif code:
            reason = code[1].strip()
        else:
            return error
        return InputError(
            f"cannot save {path}: {reason}; free some space or name another folder, and start "
            f"again: the checkpoint before it is whole"
        )


def load(path: Any, abstract: Any) -> Any:
    """The state in a checkpoint's folder, laid out as `abstract` says."""
    flat = _flat(abstract)
    with warnings.catch_warnings():
        # Orbax says that it lays arrays out anew, which is what was asked for.
        warnings.filterwarnings("ignore", module="orbax")
        try:
            restored = ocp.load(path, flat)
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(
                f"the checkpoint {path} does not fit this run ({reason}); give it the settings of "
                f"the run that wrote it"
            ) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in flat])


def _flat(tree: Any) -> dict[str, Any]:
    """The arrays by name, in the tree's order: nothing on disk depends on classes of optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {partition.path_of(key_path).replace("/", "."): leaf for key_path, leaf in leaves}


def _marker(path: epath.Path) -> epath.Path:
    """The file that says that a checkpoint is not complete."""
    return path.parent / f"{path.name}{INCOMPLETE}"


def _suffixes() -> Iterator[str]:
    yield ""
    yield from (f"-{count}" for count in range(2, 1_000_000))


def _only_orbax(path: epath.Path) -> bool:
    """Whether a folder holds nothing but what Orbax and this module put into a checkpoint."""
    manifests = (manifest.NAME, f"{manifest.NAME}.writing")
    return all(entry.name in manifests or ORBAX.fullmatch(entry.name) for entry in path.iterdir())


def _filled(path: epath.Path) -> bool:
    """Whether Orbax has written a checkpoint there, complete or not."""
    return _only_orbax(path) and (path / METADATA).exists()


def _settings(path: epath.Path) -> Any:
    """The settings in a run.json that this program wrote; None if it did not."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("program") != "lminf":
        return None
    return content["config"] if isinstance(content.get("config"), dict) else None
