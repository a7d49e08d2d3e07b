"""Rows -> tables."""

import pytest

from lminf.run import tables

ROWS = [
    {"length": 1024, "policy": "full", "nll": 2.5},
    {"length": 1024, "policy": "a|b", "nll": 2.25},
    {"length": 2048, "policy": "full", "nll": 12345678.9},
]


def test_a_pivot_has_a_row_per_index_and_a_column_per_value():
    assert tables.pivot(ROWS, index="length", columns="policy", value="nll") == [
        {"length": 1024, "full": 2.5, "a|b": 2.25},
        {"length": 2048, "full": 12345678.9, "a|b": None},
    ]


def test_a_cell_measured_twice_is_an_error():
    with pytest.raises(ValueError, match="two rows have length=1024"):
        tables.pivot([ROWS[0], ROWS[0]], index="length", columns="policy", value="nll")


def test_markdown_aligns_numbers_and_escapes_bars():
    table = tables.pivot(ROWS, index="length", columns="policy", value="nll")
    assert tables.markdown(table).splitlines() == [
        "| length | full | a\\|b |",
        "| ---: | ---: | ---: |",
        "| 1,024 | 2.500 | 2.250 |",
        "| 2,048 | 1.23e+07 |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (16384, "16,384"), (0.0, "0.000"), (1e-9, "1e-09"), ("x", "x")],
)
def test_a_cell_is_short(value, text):
    assert tables.cell(value) == text


def test_no_rows_are_a_table_too():
    assert tables.markdown([]) == "(no rows)"
    tables.rich_table([])
