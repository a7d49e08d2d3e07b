"""Rows -> tables for a terminal and for Markdown. A table is itself a list of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    """The rows as a Markdown table; numbers right-aligned, floats to `digits` decimals."""
    if not rows:
        return "(no rows)"
    names = column_names(rows)
    rule = ["---:" if _numeric(rows, name) else "---" for name in names]
    heads = [_escaped(printable(name)) for name in names]
    cells = [[_escaped(cell(row.get(name), digits)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *cells])


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
            for row in self.rows:
                table.add_row(*(Text(cell(row.get(name), self.digits)) for name in names))
            yield table

    def groups(self, width: int) -> list[list[str]]:
        """Names of the columns that stand side by side in so many characters."""
        first, *others = column_names(self.rows) or [""]
        start = min(self.width_of(first), (width - 1) // 2) + 1  # the line at the end
        groups, used = [[first]], start
        for name in others:
            # One that no width is enough for shares its line with the first alone, and is folded.
            if used + self.width_of(name) > width and len(groups[-1]) > 1:
                groups.append([first])
                used = start
            groups[-1].append(name)
            used += self.width_of(name)
        return groups

    def width_of(self, name: str) -> int:
        """Of a column with the spaces and the line before it; a head is broken between words."""
        cells = (cell(row.get(name), self.digits) for row in self.rows)
        return 3 + max(map(len, [*name.split(), *cells]), default=0)


def cell(value: Any, digits: int = 3) -> str:
    """One value as text: floats to `digits` decimals, or in scientific form if that shows none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        tiny = value != 0 and abs(value) < 10**-digits
        return f"{value:.{digits}g}" if tiny or abs(value) >= 1e6 else f"{value:,.{digits}f}"
    return printable(str(value))  # from files that anybody may have written


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)
