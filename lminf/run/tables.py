"""Rows -> tables for a terminal and for Markdown. A table is itself a list of rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.table import Table
from rich.text import Text

from lminf.errors import printable
from lminf.run.folder import Row


def pivot(rows: Sequence[Row], *, index: str, columns: str, value: str) -> list[Row]:
    """One row per distinct `index`, one column per distinct `columns`, each cell the `value`.

    Order is that of first appearance. A cell measured twice is an error, because showing either
    measurement would hide the other.
    """
    names = list(dict.fromkeys(str(row[columns]) for row in rows if value in row))
    table: dict[Any, Row] = {}
    for row in rows:
        if value not in row:
            continue
        line = table.setdefault(row[index], {index: row[index], **dict.fromkeys(names)})
        name = str(row[columns])
        if line[name] is not None:
            raise ValueError(
                f"two rows have {index}={row[index]!r} and {columns}={name!r}; "
                "choose rows with one value of every other coordinate first"
            )
        line[name] = row[value]
    return list(table.values())


def column_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown(rows: Sequence[Row], *, digits: int = 3) -> str:
    """The rows as a Markdown table; numbers right-aligned, as `column` writes them."""
    if not rows:
        return "(no rows)"
    names = column_names(rows)
    rule = ["---:" if _numeric(rows, name) else "---" for name in names]
    heads = [_escaped(printable(name)) for name in names]
    columns = [map(_escaped, column([row.get(name) for row in rows], digits)) for name in names]
    lines = [heads, rule, *zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def rich_table(
    rows: Sequence[Row], *, title: str | None = None, digits: int = 3
) -> ConsoleRenderable:
    """The rows as a table that a rich console prints; where it is too wide, as tables below each
    other that all begin with the first column.
    """
    return _Fitting(rows, title, digits)


@dataclass(frozen=True)
class _Fitting:
    rows: Sequence[Row]
    title: str | None
    digits: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        title = None if self.title is None else Text(printable(self.title))
        for index, names in enumerate(self.groups(options.max_width)):
            table = Table(title=None if index else title, title_justify="left")
            for name in names:
                # Folded, not cut: two names that begin alike must stay two names. Values are not
                # folded for the sake of long heads.
                side = "right" if _numeric(self.rows, name) else "left"
                least = min(self.width_of(name), (options.max_width - 1) // 2) - 3
                table.add_column(
                    Text(printable(name)), justify=side, overflow="fold", min_width=least
                )
            for line in zip(*(self.cells.get(name, ()) for name in names), strict=True):
                table.add_row(*map(Text, line))
            yield table

    @cached_property
    def cells(self) -> dict[str, list[str]]:
        return {
            name: column([row.get(name) for row in self.rows], self.digits)
            for name in column_names(self.rows)
        }

    def groups(self, width: int) -> list[list[str]]:
        """Names of the columns that stand side by side in so many characters."""
        first, *columns = column_names(self.rows) or [""]
        start = min(self.width_of(first), (width - 1) // 2) + 1  # the line at the end
        groups, used = [[first]], start
        for name in columns:
            # One that no width is enough for shares its line with the first alone, and is folded.
            if used + self.width_of(name) > width and len(groups[-1]) > 1:
                groups.append([first])
                used = start
            groups[-1].append(name)
            used += self.width_of(name)
        return groups

    def width_of(self, name: str) -> int:
        """Of a column with the spaces and the line before it; a head is broken between words."""
        return 3 + max(map(len, [*name.split(), *self.cells.get(name, ())]), default=0)


def column(values: Sequence[Any], digits: int = 3) -> list[str]:
    """The values of one column as text, floats with the same number of decimals.

    Decimals follow the largest value: `digits` of them from 0.01 to 100, fewer above, so many below
    that it keeps `digits` digits. A difference of 3e-08 beside losses of 2.4 is 0.000.
    """
    floats = [abs(value) for value in values if isinstance(value, float) and 0 < abs(value) < 1e6]
    largest, least = max(floats, default=1.0), min(floats, default=1.0)
    decimals = digits
    for bound, fewer in ((1000, 3), (100, 2)):
        if largest >= bound and least >= 10.0 ** (fewer - digits + 1):
            decimals = max(0, digits - fewer)
            break
    if largest < 1e-4:  # all of them
        return [_cell(value, f".{digits - 1}e") for value in values]
    if largest < 0.01:
        decimals = digits - 1 - math.floor(math.log10(largest))
    return [_cell(value, f",.{decimals}f") for value in values]


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else f"{value:.3e}"
    if isinstance(value, float):
        if not math.isfinite(value) or abs(value) >= 1e9:
            return f"{value:.3g}"
        text = f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:{form}}"
        return text if text.strip("-0.,") else text.removeprefix("-")  # no minus nought
    return printable(str(value))


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)
