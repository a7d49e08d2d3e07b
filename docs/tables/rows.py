"""The committed rows that generated pages are made of, and their form in Markdown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lminf.run import folder

FOLDER = Path(__file__).resolve().parents[1]  # docs
ROOT = FOLDER.parent
BEGIN, END = "<!-- table: docs/make_tables.py -->\n", "<!-- end of table -->\n"
# Abbreviations of experiments in the labels of links.
LABELS = {
    "length_generalization": "lg", "long_context_eval": "lce", "long_context_eval_long": "long",
    "decode_cost": "dc", "passkey": "pk", "vocab_law": "vl", "step_law": "sl",
    "train_throughput": "tt",
}  # fmt: skip


class Rows:
    """The committed rows of one experiment; cells of tables link to their lines."""

    def __init__(self, name: str):
        self.name = name
        self.rows = folder.RunFolder(FOLDER / "results" / name).rows()

    def select(self, **values: Any) -> tuple[int, dict[str, Any]]:
        """Line number, from 1, and content of the one row with these values."""
        matching = [
            (line, row)
            for line, row in enumerate(self.rows, 1)
            if all(row.get(key) == value for key, value in values.items())
        ]
        if len(matching) != 1:
            raise LookupError(f"{len(matching)} rows of {self.name} have {values}, not one")
        return matching[0]

    def link(self, text: Callable[[Any], str], **values: Any) -> str:
        """`text(row)` of the one row with these values, as a link to it."""
        line, row = self.select(**values)
        return f"[{text(row)}][{LABELS[self.name]}{line}]"


def benchmark(name: str) -> list[dict[str, Any]]:
    """The rows of a committed benchmark."""
    text = (ROOT / f"benchmarks/results/{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def markdown(lines: list[list[str]]) -> str:
    """Cells as the lines of a Markdown table, the first line its head."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def with_table(page: Path, table: str) -> str:
    """The page with another table between its marks."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + table + END + rest.split(END)[1]
