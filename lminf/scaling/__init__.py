"""Scaling laws from published measurements: vocabulary, learning rate and batch, loss, density.

table = read_vocab("exp_data.csv")
law = fit(LossFit(mode="tokens"), table)
law.optimum(n_nv=7e9, flops=2e22)
law.interval(n_nv=7e9, flops=2e22)
law.save("law.json")                       load("law.json") anywhere
"""

import json
from pathlib import Path
from typing import Any

from lminf.atomic import read_bytes
from lminf.errors import InputError
from lminf.scaling import laws as _laws
from lminf.scaling.chinchilla import ChinchillaFit, ChinchillaLaw
from lminf.scaling.density import DensityFit, DensityLaw
from lminf.scaling.fertility import PUBLISHED, Fertility
from lminf.scaling.laws import Law
from lminf.scaling.resample import Resampling
from lminf.scaling.steps import StepFit, StepLaw
from lminf.scaling.tables import (
    CurveTable,
    StepTable,
    VocabTable,
    read_curves,
    read_step,
    read_vocab,
)
from lminf.scaling.vocab_derivative import DerivativeFit, DerivativeLaw
from lminf.scaling.vocab_isoflop import IsoflopFit, IsoflopLaw
from lminf.scaling.vocab_loss import LossFit, LossLaw

__all__ = [
    "ChinchillaFit",
    "DensityFit",
    "DerivativeFit",
    "IsoflopFit",
    "Law",
    "LossFit",
    "StepFit",
    "fit",
    "load",
    "read_curves",
    "read_step",
    "read_vocab",
]

KINDS = {
    law.kind: law
    for law in (IsoflopLaw, DerivativeLaw, LossLaw, StepLaw, ChinchillaLaw, DensityLaw)
}
TABLES = {StepFit: StepTable, ChinchillaFit: CurveTable, DensityFit: CurveTable}


def fit(
    procedure: Any,
    table: VocabTable | StepTable | CurveTable,
    *,
    fertility: Fertility = PUBLISHED,
    draws: int = 300,
    cluster: str | None = None,
    seed: int = 0,
) -> Any:
    """The fitted law, with `draws` resampled fits for its intervals.

    `cluster` is what is resampled: "run" (vocabulary, default), "group" (step, default), "family"
    or "row". InputError when the table does not determine the law.
    """
    needed = TABLES.get(type(procedure), VocabTable)
    if not isinstance(table, needed):
        raise InputError(
            f"{type(procedure).__name__} is fitted to a {needed.__name__}, not to a "
            f"{type(table).__name__}"
        )
    resampling = Resampling(draws, cluster, seed)
    if isinstance(table, VocabTable):
        return procedure.fit(table, fertility, resampling)
    return procedure.fit(table, resampling)


def load(path: Path | str) -> Any:
    """The law stored in a JSON file by `Law.save` or `lminf scaling fit`."""
    try:
        data = json.loads(read_bytes(Path(path)).decode())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: no JSON ({error}); write one by `lminf scaling fit`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a law.json") from error
    return _laws.from_json(data, KINDS, str(path))
