"""Writes published_draws.json: the spread that the published laws' intervals are made of.

python -m lminf.scaling.make_published_draws VOCAB.csv STEP.csv
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lminf.scaling import fertility, tables
from lminf.scaling.steps import StepLaw
from lminf.scaling.vocab_derivative import VocabLaw2
from lminf.scaling.vocab_isoflop import VocabLaw1
from lminf.scaling.vocab_loss import VocabLaw3

KEPT = 100


def main(vocab_path: str, step_path: str) -> None:
    published = fertility.PUBLISHED
    table = tables.read_vocab(vocab_path, published)
    fits = {
        "isoflop": VocabLaw1().fit(table, fertility=published),
        "derivative": VocabLaw2().fit(table, fertility=published),
        "loss-reference": VocabLaw3("reference").fit(table, fertility=published),
        "loss-tokens": VocabLaw3("tokens").fit(table, fertility=published),
    }
    step = StepLaw().fit(tables.read_step(step_path, 2048))
    fits["step"] = step
    stored: dict[str, Any] = {"bowl": {}}
    for name, value in step.diagnostics["bowl"].items():
        if name != "unit":
            stored["bowl"][name] = value if name == "groups" else float(f"{value:.6g}")
    for name, law in fits.items():
        print(name, law.resampling, law.intervals)
        stored[name] = {
            "point": {key: round(value, 7) for key, value in law.constants.items()},
            "draws": {
                key: [float(f"{value:.6g}") for value in values[:KEPT]]
                for key, values in law.draws.items()
                if key not in ("alpha_nnv", "alpha_h", "batch_n")
            },
        }
    text = json.dumps(stored, indent=1)
    text = re.sub(r"\[[^\]]*\]", lambda found: " ".join(found[0].split()), text)  # one line each
    Path(__file__).with_name("published_draws.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
