"""Fills the draws of lminf/scaling/published.json, the spread that the laws' intervals are made of,
and the re-fits of lminf/scaling/vocab_refits.json, which the recommended vocabulary rests on.

python -m tests.scaling.make_published VOCAB.csv STEP.csv
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from lminf import scaling
from lminf.scaling import (
    fertility,
    resample,
    robust_fit,
    stored,
    tables,
    vocab_loss,
)
from lminf.scaling.steps import StepFit
from lminf.scaling.tables import VocabTable
from lminf.scaling.vocab_derivative import SPREAD, DerivativeFit, budget_constant
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit

KEPT = 100
NOT_DRAWN = ("alpha_nnv", "alpha_h", "batch_n")  # imposed by the procedure
FLOPS_LIMITS = (0.0, 1e17, vocab_loss.FLOPS_LIMIT, 5e17, 1e18, 2e18, 3e18)
FAMILY_DRAWS = 60
ROWS = "all six fitted families (1,200 rows)"
RESAMPLING = {
    "tao2024-isoflop": f"re-fits over resampled runs of {ROWS}, without interpolation, not centred",
    "tao2024-derivative": f"anchors of {ROWS}: {SPREAD}",
    **dict.fromkeys(
        ("tao2024-loss", "tao2024-loss-tokens"),
        "re-fits over resampled runs of all six fitted families (1,054 of 1,200 rows reach 2.18e17 "
        "FLOPs), not centred",
    ),
    "li2025-step": "re-fits over resampled groups (all 17), centred on the published constants",
}


def main(vocab_path: str, step_path: str) -> None:
    table = tables.read_vocab(vocab_path)
    step = scaling.fit(StepFit(), tables.read_step(step_path), draws=1000)
    fits = {
        "tao2024-isoflop": scaling.fit(IsoflopFit(densify="none"), table),
        "tao2024-derivative": scaling.fit(DerivativeFit(), table),
        "tao2024-loss": scaling.fit(LossFit("reference"), table),
        "tao2024-loss-tokens": scaling.fit(LossFit("tokens"), table),
        "li2025-step": step,
    }
    laws = stored.read("published.json")
    for data in laws:
        law = fits.get(data["version"])
        if law is None:
            continue
        print(data["version"], law.resampling, law.intervals)
        moved = dict.fromkeys(law.draws, 0.0)
        if data["version"] == "li2025-step":  # by the procedure of the published constants
            moved = {name: data["constants"][name] - law.constants[name] for name in law.draws}
        data["resampling"] = RESAMPLING[data["version"]]
        data["draws"] = {
            name: [float(f"{value + moved[name]:.9g}") for value in values[:KEPT]]
            for name, values in law.draws.items()
            if name not in NOT_DRAWN
        }
    bowl = step.diagnostics["bowl"]
    next(data for data in laws if data["kind"] == "step")["diagnostics"]["bowl"] = {
        name: value if name == "groups" else float(f"{value:.6g}")
        for name, value in bowl.items()
        if name != "unit"
    }
    write(stored.FOLDER / "published.json", laws)
    write(stored.FOLDER / "vocab_refits.json", refits(table))


def refits(table: VocabTable) -> dict:
    """Approach 3 fitted to every choice of rows, by both covariates."""
    base = (table.flops >= vocab_loss.FLOPS_LIMIT) * 1.0
    families = resample.bootstrap_weights(table.family, draws=FAMILY_DRAWS, seed=0)
    kinds = {
        "all_rows": base[None],
        "limits": np.array([(table.flops >= limit) * 1.0 for limit in FLOPS_LIMITS]),
        "families": base * families,
    }
    lower, upper = (np.array(bound, float) for bound in vocab_loss.BOUNDS["published"])
    fits = {kind: [{} for _ in weights] for kind, weights in kinds.items()}
    for mode in ("reference", "tokens"):
        columns = LossFit(mode).columns(table, fertility.PUBLISHED)
        for kind, weights in kinds.items():
            found = robust_fit.minimise(
                vocab_loss.residual, columns, starts=vocab_loss.STARTS, lower=lower, upper=upper,
                weights=weights,
            )  # fmt: skip
            assert found.converged.all(), (mode, kind)
            for fit, theta in zip(fits[kind], found.parameters, strict=True):
                fit[mode] = [float(f"{value:.9g}") for value in theta]
    return {
        "source": f"the {len(table):,} rows of arXiv:2407.13623's data file, sha256 "
        f"{table.digest[:8]}, with alpha2 and beta in [0.1, 1)",
        "rows": len(table),
        "parameters": list(vocab_loss.PARAMETERS),
        "ln_k_nnv": float(f"{budget_constant(table, fertility.PUBLISHED):.9g}"),
        "flops_limits": list(FLOPS_LIMITS),
        **fits,
    }


def write(path: Path, data) -> None:
    """JSON with every list of numbers on one line."""
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
