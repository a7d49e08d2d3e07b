import numpy as np
import pytest
from matplotlib.figure import Figure

from lminf.errors import InputError
from lminf.experiments import diagnose_lengths

LM_INFINITE = "lm_infinite:window=16,sinks=2"


@pytest.fixture(scope="module")
def measured():
    return {}


@pytest.fixture
def rows(rows_of, measured):
    if not measured:
        measured["rows"] = rows_of(
            "diagnose_lengths", length=100, layers=(0, 1), queries=8, policies=("full", LM_INFINITE)
        )
    return measured["rows"]


def of(rows, factor, **columns):
    return [
        row
        for row in rows
        if row["factor"] == factor and all(row[name] == x for name, x in columns.items())
    ]


@pytest.mark.slow
def test_logits_are_summarised_at_every_distance(rows):
    for layer in (0, 1):
        found = of(rows, "logits", layer=layer)
        distances = sorted({row["distance"] for row in found})
        assert distances == [1, 3, 7, 15, 31, 63, 99]
        assert len(found) == 3 * len(distances)
        by = {(row["distance"], row["statistic"]): row["value"] for row in found}
        for distance in distances:
            assert by[distance, "min"] <= by[distance, "mean"] <= by[distance, "max"]


def test_entropy_is_at_most_that_of_looking_at_all_alike(rows):
    for policy, most in (("full", 100), (LM_INFINITE, 18)):
        found = of(rows, "entropy", policy=policy, layer=1)
        assert found[-1]["position"] == 99
        assert found[-1]["attended"] == most
        for row in found:
            assert 0 <= row["value"] <= np.log(row["attended"]) + 1e-6


def test_features_lie_on_two_axes(rows):
    found = of(rows, "features", layer=0)
    assert [row["position"] for row in found] == list(range(100))
    assert all(row["norm"] > 0 and -1 <= row["cosine_to_later"] <= 1 for row in found)
    places = np.array([[row["x"], row["y"]] for row in found])
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-5)
    assert places[:, 0].std() >= places[:, 1].std()


def test_each_factor_has_a_figure_and_each_layer_a_line(rows):
    figures = diagnose_lengths.plot(rows)
    assert set(figures) == {"logits_by_distance", "entropy_by_length", "first_tokens"}
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert [line["layer"] for line in diagnose_lengths.table(rows)] == [0, 1]


def test_a_layer_that_is_not_there_is_refused(rows_of):
    with pytest.raises(InputError, match="layer 2 of 2"):
        rows_of("diagnose_lengths", layers=(0, 2))
