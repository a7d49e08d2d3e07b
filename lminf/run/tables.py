"""Rows -> tables for a terminal and for Markdown. A table is itself a list of rows."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

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
    heads = [_escaped(name) for name in names]
    cells = [[_escaped(cell(row.get(name), digits)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *cells])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def rich_table(rows: Sequence[Row], *, title: str | None = None, digits: int = 3) -> Table:
    """The rows as a table that a rich console prints."""
    table = Table(title=title, title_justify="left")
    names = column_names(rows)
    for name in names:
        # Folded, not cut: two names that begin alike must stay two names.
        side = "right" if _numeric(rows, name) else "left"
        table.add_column(name, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(name), digits) for name in names))
    return table


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
    return str(value)


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)
