"""Training under several policies: the same text for all, and what the table says of them."""

import jax
import numpy as np
import pytest

from lminf.experiments import train_attention


@pytest.mark.slow
def test_every_policy_learns_and_is_measured_by_position(rows_of):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("train_attention")
    for policy in ("full", "moba:block=8,topk=4"):
        first, last = (row["loss"] for row in rows if (row["part"], row["policy"])
                       == ("loss", policy))  # fmt: skip
        assert last < first < np.log(257)
        blocks = [row for row in rows if (row["part"], row["policy"]) == ("position", policy)]
        assert [row["start"] for row in blocks] == list(range(0, 64, 8))
        assert np.mean([row["loss"] for row in blocks]) == pytest.approx(last, abs=1e-5)
    full, moba = train_attention.table(rows)
    assert full["tokens/s"] > 0 < moba["tokens/s"]
    # Four blocks of eight tokens are all that the first half of a window has.
    assert moba["0–8"] == pytest.approx(full["0–8"], abs=0.2)
    assert set(train_attention.plot(rows)) == {"train_attention", "by_position"}
