"""Training with sparse attention: the loss falls, and is told by position in the window."""

import jax
import numpy as np
import pytest

from lminf.experiments import train_attention

MOBA = "moba:block=8,topk=4"


@pytest.mark.slow
def test_a_sparse_policy_learns_and_is_measured_by_position(rows_of):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("train_attention", policies=(MOBA,))  # one: each compiles for ten seconds
    first, last = (row["loss"] for row in rows if row["part"] == "loss")
    assert last < first < np.log(257)
    blocks = [row for row in rows if row["part"] == "position"]
    assert [row["start"] for row in blocks] == list(range(0, 64, 8))
    assert np.mean([row["loss"] for row in blocks]) == pytest.approx(last, abs=1e-5)
    (line,) = train_attention.table(rows)
    assert line["policy"] == MOBA
    assert line["after 20"] == last
    assert line["tokens/s"] > 0
    assert line["0–8"] == blocks[0]["loss"]
    assert rows_of("train_attention", rows, policies=(MOBA,)) == []
    assert set(train_attention.plot(rows)) == {"train_attention", "by_position"}
