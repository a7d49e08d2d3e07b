"""Fits without one family or group: how much a law rests on each, what it predicts unseen."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lminf.errors import InputError
from lminf.scaling import gap, rivals
from lminf.scaling.fertility import Fertility
from lminf.scaling.steps import StepLaw
from lminf.scaling.tables import StepTable, VocabTable
from lminf.scaling.vocab_loss import LossLaw

Row = dict[str, Any]
MOST_FAMILIES = 24  # each is a fit
MOST_GROUPS = 512  # each is a surface


def leave_one_family_out(
    procedure, table: VocabTable, *, fertility: Fertility, n_nv: float = 7e9
) -> list[Row]:
    """Constants without each family, V at n_nv, and approach 3's loss error on that family.

    Of more than MOST_FAMILIES the first ones are left out, one at a time.
    """
    rows = []
    for family in np.unique(table.n_nv)[:MOST_FAMILIES]:
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


def leave_one_group_out(procedure: StepLaw, table: StepTable) -> Iterator[Row]:
    """Constants without each group, and the gap there of the law that never saw it.

    Of more than MOST_GROUPS the first ones are left out, one at a time.
    """
    for group, law in itertools.islice(procedure.without_each_group(table), MOST_GROUPS):
        unseen = np.flatnonzero(table.group == group)
        row: Row = {"n": float(table.n[unseen[0]]), "d": float(table.d[unseen[0]])}
        try:
            if law is None:
                raise InputError("N and D move together in the other groups")
            row |= law.constants
            found = gap.gaps(table.select(unseen), [rivals.from_law(law, "refit")])["refit"][0]
            row["gap_per_mille"] = found.gap["linear"]
        except InputError as error:
            row["note"] = str(error)
        yield row
