import pytest
from matplotlib.figure import Figure

from lminf.experiments import length_generalization as experiment


@pytest.mark.slow
def test_a_row_is_one_policy_and_block(rows_of):
    rows = rows_of(
        "length_generalization", length=96, block=48,
        policies=("full", "lm_infinite:window=16,sinks=2"),
    )  # fmt: skip
    assert [(row["policy"], row["start"]) for row in rows] == [
        (policy, start)
        for policy in ("re-read", "full", "lm_infinite:window=16,sinks=2")
        for start in (0, 48)
    ]
    reread, full, _ = rows[::2]
    # Within the trained length, re-reading is reading in full.
    assert full["nll"] == reread["nll"]
    assert full["excess_over_reread"] == reread["excess_over_reread"] == 0
    assert all(isinstance(figure, Figure) for figure in experiment.plot(rows).values())
    assert len(experiment.table(rows)) == 3 + 2
