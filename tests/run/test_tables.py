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
        "| 2,048 | 12,345,679 |  |",
    ]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([None, True, 16384, "x"], ["", "yes", "16,384", "x"]),
        ([2.44, 2.96e-08, -1e-9, 0.0], ["2.440", "0.000", "0.000", "0.000"]),  # nats
        ([0.001, 0.0005, 0.004], ["0.00100", "0.00050", "0.00400"]),  # learning rates
        ([54.5288, 159.834], ["54.5", "159.8"]),  # milliseconds
        ([2392.05, 13.0], ["2,392", "13"]),  # tokens a second
        ([2392.05, 0.851], ["2,392.050", "0.851"]),  # two units in one column
        ([1e-7, 2.5e-8], ["1.00e-07", "2.50e-08"]),
        ([1.5e21, 2e3], ["1.5e+21", "2,000"]),
    ],
)
def test_a_column_is_written_as_a_person_reads_it(values, texts):
    assert tables.column(values) == texts


def test_control_characters_are_shown_and_markup_is_text():
    rows = [{"a\x1b[2J": "x\x1b[31m\ud800", "b": "[/red]"}]
    shown = printed(rows, 80) + tables.markdown(rows)
    assert "\x1b" not in shown
    assert "\\x1b[31m\\ud800" in shown
    assert "[/red]" in shown


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
