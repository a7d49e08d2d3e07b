"""Fits without one family or group: how much a law rests on each, what it predicts unseen."""

from typing import Any

import numpy as np

from lminf.errors import InputError
from lminf.scaling import gap, rivals
from lminf.scaling.fertility import Fertility
from lminf.scaling.steps import StepLaw
from lminf.scaling.tables import StepTable, VocabTable
from lminf.scaling.vocab_loss import LossLaw

Row = dict[str, Any]


def leave_one_family_out(
    procedure, table: VocabTable, *, fertility: Fertility, n_nv: float = 7e9
) -> list[Row]:
    """Constants without each family, V at n_nv, and approach 3's loss error on that family."""
    rows = []
    for family in np.unique(table.n_nv):
        unseen = table.n_nv == family
        row: Row = {"left_out_n_nv": float(family)}
        try:
            law = procedure.fit(table.select(~unseen), fertility=fertility, draws=0)
            row |= law.constants
            if isinstance(law, LossLaw):
                row["rmse_left_out"] = rmse(law, table.select(unseen))
            row["vocab"] = law.optimum(n_nv=n_nv).vocab_size
        except InputError as error:
            row["note"] = str(error)
        rows.append(row)
    return rows


def rmse(law: LossLaw, table: VocabTable) -> float:
    """Root mean square of predicted minus measured L_u, nats per token."""
    return float(np.sqrt(np.mean((law.table_loss(table) - table.loss) ** 2)))


def leave_one_group_out(procedure: StepLaw, table: StepTable) -> list[Row]:
    """Constants without each group, and the gap there of the law that never saw it."""
    rows = []
    for group in np.unique(table.group):
        unseen = table.group == group
        row: Row = {"n": float(table.n[unseen][0]), "d": float(table.d[unseen][0])}
        try:
            law = procedure.fit(table.select(~unseen), draws=0)
            row |= law.constants
            rule = rivals.from_law(law, "refit")
            found = gap.gaps(table.select(unseen), [rule])["refit"][0]
            row["gap_per_mille"] = found.gap["linear"]
        except InputError as error:
            row["note"] = str(error)
        rows.append(row)
    return rows
