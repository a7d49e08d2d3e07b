"""Folders of finished sweeps, as `lminf scaling collect` makes tables of them."""

import argparse
import json
import random
from pathlib import Path

from lminf.commands.scaling.collect import collect
from tests.fuzz import mutate as mutations
from tests.scaling.test_collect import step_rows, vocab_rows


def seeds(folder: Path) -> None:
    for kind, rows in (("vocab", vocab_rows()), ("step", step_rows())):
        (folder / kind).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / kind / "rows.jsonl").write_text(text)


def read(path: Path) -> None:
    subject = "vocab" if path.name.startswith("vocab") else "step"
    where = "corpus=library" if subject == "step" else None
    out = path / "table.csv"
    collect(argparse.Namespace(runs=str(path), where=where, out=str(out), subject=subject))


def mutate(rng: random.Random, path: Path) -> None:
    file = path / "rows.jsonl"
    lines = file.read_bytes().splitlines()
    if rng.random() < 0.2:
        file.write_bytes(mutations.change_bytes(rng, file.read_bytes()))
        return
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        lines[at] = mutations.change_json(rng, lines[at])
    file.write_bytes(b"\n".join(lines))
