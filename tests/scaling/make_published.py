"""Fills the draws of lminf/scaling/published.json: the spread that the laws' intervals are made of.

python -m tests.scaling.make_published VOCAB.csv STEP.csv
"""

import json
import re
import sys

from lminf.scaling import fertility, published, tables
from lminf.scaling.steps import StepFit
from lminf.scaling.vocab_derivative import DerivativeFit
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit

KEPT = 100
CENTRED = ("tao2024-isoflop", "li2025-step")  # by the same procedure as the published constants
NOT_DRAWN = ("alpha_nnv", "alpha_h", "batch_n")  # imposed by the procedure


def main(vocab_path: str, step_path: str) -> None:
    table = tables.read_vocab(vocab_path)
    options = {"fertility": fertility.PUBLISHED}
    step = StepFit().fit(tables.read_step(step_path))
    fits = {
        "tao2024-isoflop": IsoflopFit().fit(table, **options),
        "tao2024-derivative": DerivativeFit().fit(table, **options),
        "tao2024-loss": LossFit("reference").fit(table, **options),
        "tao2024-loss-tokens": LossFit("tokens").fit(table, **options),
        "li2025-step": step,
    }
    stored = json.loads(published.FILE.read_text(encoding="utf-8"))
    for data in stored:
        law = fits.get(data["version"])
        if law is None:
            continue
        print(data["version"], law.resampling, law.intervals)
        moved = dict.fromkeys(law.draws, 0.0)
        if data["version"] in CENTRED:
            moved = {name: data["constants"][name] - law.constants[name] for name in law.draws}
        data["draws"] = {
            name: [float(f"{value + moved[name]:.9g}") for value in values[:KEPT]]
            for name, values in law.draws.items()
            if name not in NOT_DRAWN
        }
    bowl = step.diagnostics["bowl"]
    next(data for data in stored if data["kind"] == "step")["diagnostics"]["bowl"] = {
        name: value if name == "groups" else float(f"{value:.6g}")
        for name, value in bowl.items()
        if name != "unit"
    }
    text = json.dumps(stored, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)  # one line
    published.FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
