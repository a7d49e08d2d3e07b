"""The README's numbers are those of the committed rows that they link to."""

import json
import re

from docs import make_tables
from tests.test_layers import ROOT

TEXT = (ROOT / "README.md").read_text()
TARGETS = dict(re.findall(r"^\[(\w+)\]: (\S+)$", TEXT, re.MULTILINE))
ROW = re.compile(r"(docs/results/\w+/rows\.jsonl)#L(\d+)")
LINKS = [
    (shown, *ROW.fullmatch(TARGETS[label]).groups())
    for shown, label in re.findall(r"\[([^\]]+)\]\[(\w+)\]", TEXT)
]


def test_the_tables_are_what_the_rows_give():
    assert make_tables.readme() == TEXT, "run: python docs/make_tables.py"


def test_every_number_of_a_table_stands_in_the_row_it_links_to():
    """Read with no help from what wrote them."""
    assert len(LINKS) > 50
    for shown, file, line in LINKS:
        row = json.loads((ROOT / file).read_text().splitlines()[int(line) - 1])
        values = [v for v in row.values() if isinstance(v, int | float)]
        values += [v / 2**20 for v in values]
        for number in re.findall(r"[\d.,]+", shown):
            digits = len(number.partition(".")[2])
            found = float(number.replace(",", ""))
            assert any(round(v, digits) == found for v in values), (shown, file, line)


def test_a_tables_rows_and_columns_say_what_their_numbers_are():
    table = TEXT[TEXT.index("| nats/token") :].partition("\n\n")[0].splitlines()
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    policies = {name: policy for policy, name in make_tables.NAMES.items()}
    assert len(lines) == len(policies)
    for name, *cells in lines:
        for head, cell in zip(heads[1:], cells, strict=True):
            label = re.search(r"\]\[(\w+)\]", cell)[1]
            file, line = ROW.fullmatch(TARGETS[label]).groups()
            row = json.loads((ROOT / file).read_text().splitlines()[int(line) - 1])
            assert row["policy"] == policies[name]
            if head != "seconds":
                assert row["start"] == 1024 * int(head.partition("–")[0])


def test_it_has_six_commands_more_and_a_program():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert sum(len(text.splitlines()) for language, text in blocks if language == "sh") >= 6
    assert any(language == "python" for language, _ in blocks)
