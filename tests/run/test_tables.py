"""Rows -> tables."""

import io

import pytest
import rich.console

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


def printed(rows, width):
    console = rich.console.Console(width=width, file=io.StringIO(), highlight=False)
    console.print(tables.rich_table(rows, title="losses"))
    return console.file.getvalue()


def test_a_table_too_wide_for_the_terminal_is_several_and_breaks_no_number():
    names = [f"{1000 * i}–{1000 * (i + 1)}" for i in range(12)]
    rows = [{"policy": f"a_policy:window={4**i},sinks=10", **dict.fromkeys(names, -1.2345 * i)}
            for i in range(1, 4)]  # fmt: skip
    wide, narrow = printed(rows, 300), printed(rows, 60)
    assert wide.count("policy:") == 3
    assert narrow.count("losses") == 1
    assert narrow.count("┃ policy") > 2
    assert all(len(line) <= 60 for line in narrow.splitlines())
    for text in [*names, "-1.234", "-2.469", "-3.704", *(row["policy"] for row in rows)]:
        assert text in wide
        assert text in narrow


def test_no_rows_are_a_table_too():
    assert tables.markdown([]) == "(no rows)"
    assert printed([], 80)
