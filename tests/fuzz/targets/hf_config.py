"""config.json of every family and of every rotary schedule."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import hf
from tests.checkpoints import making
from tests.fuzz import mutate as damage

GOLDENS = Path(__file__).parents[2] / "goldens"
SCHEDULES = {
    "linear": rope.Linear(2.5),
    "dynamic": rope.DynamicNTK(2.0, 64),
    "llama3": rope.Llama3(8.0, 1.0, 4.0, 16),
    "yarn": rope.YaRN(4.0, 16, 20.0, 2.0, 1.25, False),
    "longrope": rope.LongRoPE((1.0,) * 4, (2.0,) * 4, 16, 4.0),
}
# As published configurations have it beside what we write.
OTHERS = {
    "use_mrope": False,
    "_flash_attn_2_enabled": True,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "rope_theta": None,
}


def seeds(folder: Path) -> None:
    for name, spec in making.SPECS.items():
        hf.save(folder / name, spec, making.random_params(spec), None)
    for name, schedule in SCHEDULES.items():
        encoding = dataclasses.replace(making.BASE.encoding, scaling=schedule)
        spec = dataclasses.replace(making.BASE, encoding=encoding)
        hf.save(folder / name, spec, making.random_params(spec), None)
    for golden in sorted(GOLDENS.iterdir()):  # every family, as transformers writes it
        if (golden / "config.json").exists():
            files = shutil.ignore_patterns("expected.npz")
            shutil.copytree(golden, folder / f"golden_{golden.name}", ignore=files)
    hf.save(folder / "others", making.BASE, making.random_params(making.BASE), None)
    path = folder / "others" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OTHERS))


def read(path: Path) -> None:
    checkpoints.load(path)


def mutate(rng: random.Random, path: Path) -> None:
    for name in rng.choice((("config.json",), ("config.json",), ("config.json",) * 3)):
        file = path / name
        change = damage.change_json if rng.random() < 0.85 else damage.change_bytes
        file.write_bytes(change(rng, file.read_bytes()))
