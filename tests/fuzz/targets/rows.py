"""Run folders, as `lminf show` and one time in forty `lminf show --redraw` read them."""

import argparse
import json
import zlib
from pathlib import Path

from lminf.commands import show

DOCS = Path(__file__).parents[3] / "docs"
KEPT = (
    "results/decode_cost", "results/kv_cache", "results/length_generalization",
    "results/long_context_eval", "results/long_context_eval_loss", "results/passkey",
    "results/diagnose_lengths", "results/step_law", "results/train_lm", "results/train_throughput",
    "results/vocab_law", "studies/step_sweep", "studies/vocab_sweep",
)  # fmt: skip
MOST = 60  # rows of most seeds
DRAWN_ONE_IN = 40  # drawing is what takes time


def seeds(folder: Path) -> None:
    for name in KEPT:
        run = folder / Path(name).name
        run.mkdir()
        lines = (DOCS / name / "rows.jsonl").read_text().splitlines(keepends=True)
        (run / "rows.jsonl").write_text("".join(lines[:: min(7, -(-len(lines) // MOST))]))
        (run / "config.json").write_text(json.dumps({"seed": 0, "policies": ["full"]}))
        (run / "overrides.json").write_text(json.dumps({"seed": 1}))
        facts = {"experiment": run.name, "variant": "tiny"}
        (run / "environment.json").write_text(json.dumps(facts))
        (run / "report.md").write_text("# Run\n\n| a |\n| ---: |\n| 1 |\n\n![a](plots/a.png)\n")


def read(path: Path) -> None:
    rows = path / "rows.jsonl"
    chance = zlib.crc32(rows.read_bytes() if rows.is_file() else b"")
    show.run(argparse.Namespace(runs=[str(path)], redraw=chance % DRAWN_ONE_IN == 0, rows=False))
