"""A folder of checkpoints: manifests, the settings of its run, names."""

import random
from pathlib import Path

from etils import epath

from lminf.checkpoints import manifest, native
from tests.fuzz import mutate as damage

FACTS = {"config": '{"seed": 0, "data": {"batch": 8}}', "source": None}


def seeds(folder: Path) -> None:
    """Three checkpoints as they lie on disk; what Orbax would write is a few bytes here."""
    store = native.Store(str(folder / "checkpoints"), last=3)
    store.own({"seed": 0})
    for step in (1, 2, 30):
        path = epath.Path(folder / "checkpoints" / f"{step:08d}")
        (path / "state").mkdir(parents=True)
        (path / "_CHECKPOINT_METADATA").write_text("{}")
        (path / "state" / "0").write_bytes(bytes(range(100)))
        manifest.write(path, step=step, loss=1 / step, facts=FACTS)


def mutate(rng: random.Random, path: Path) -> None:
    """Damages a manifest or the settings most of the time, else any file or a name."""
    if rng.random() < 0.7:
        damage.mutate(rng, rng.choice([*path.glob(f"*/{manifest.NAME}"), path / native.SETTINGS]))
    elif rng.random() < 0.5:
        damage.mutate(rng, path)
    else:
        entry = rng.choice(sorted(path.iterdir()))
        end = rng.choice((native.INCOMPLETE, native.DAMAGED, native.TEMPORARY, "0", "_", " "))
        entry.rename(entry.with_name(rng.choice((entry.name + end, entry.name[1:], "x"))))


def read(path: Path) -> None:
    store = native.Store(str(path), last=1)
    store.settings()
    for saved in store.saved():
        saved.damage()
    store.best()
    store.check_folder()
