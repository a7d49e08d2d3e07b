"""ProLong's mixture by tokens, whole repositories, and no sight of another document."""

from collections import Counter

import numpy as np
import pytest

from lminf.data import plans, prolong, store
from lminf.data.loader import Loader
from lminf.errors import InputError


def test_tokens_of_a_mixture_are_in_the_published_shares(monkeypatch):
    monkeypatch.setattr(plans, "MIXED_ROWS", 400)
    names = list(prolong.SHARES)
    assert sum(prolong.SHARES.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    stores = [  # the number of the source is each of its tokens
        store.from_documents([np.full(n, source) for n in rng.integers(5, 90, 400)])
        for source in range(len(names))
    ]
    loaded = Loader(stores, prolong.mixture(names), length=64, rows=8, seed=0)
    counted = Counter()
    for step in range(400 // 8):
        batch = loaded.batch(step)
        counted.update(batch["tokens"][batch["weights"] == 1].tolist())
        for row in range(8):
            for segment in np.unique(batch["segments"][row]):
                inside = batch["segments"][row] == segment
                assert len(set(batch["tokens"][row][inside])) == 1
                np.testing.assert_array_equal(
                    batch["positions"][row][inside], np.arange(inside.sum())
                )
    total = counted.total()
    for source, name in enumerate(names):
        # Rows are in the exact shares, but best fit leaves a few of their places empty.
        assert counted[source] / total == pytest.approx(prolong.SHARES[name], abs=0.005)


def test_shares_of_sources_that_are_left_out_go_to_the_others():
    plan = prolong.mixture(["books", "wikipedia"])
    assert plan.weights == (0.30, 0.04)
    with pytest.raises(InputError, match="no source 'book'; did you mean 'books'"):
        prolong.mixture(["book"])


def test_a_repository_is_one_document_of_its_files_as_they_come():
    files = [("b", "import a"), ("a", "x = 1"), ("b", "y = 2"), ("a", "x = 0"), ("c", "z")]
    assert prolong.join_repositories(files) == ["import a\n\ny = 2", "x = 1\n\nx = 0", "z"]
