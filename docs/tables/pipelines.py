"""The table of docs/pipelines.md: what the simulator says of every schedule."""

from docs.tables.rows import FOLDER, markdown, with_table
from lminf.parallel import simulator


def page() -> str:
    """docs/pipelines.md with the table of the simulator."""
    rows = simulator.table()
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    return with_table(FOLDER / "pipelines.md", markdown(lines))
