"""The numbers of README.md and docs/results.md are those of the committed rows; addresses agree."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from docs.tables import results
from tests.test_layers import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
TARGETS = dict(re.findall(r"^\[(\w+)\]: (\S+)$", RESULTS, re.MULTILINE))
ROW = re.compile(r"(results/\w+/rows\.jsonl)#L(\d+)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def row_of(label: str) -> dict:
    """The committed row that a link of docs/results.md leads to."""
    match = ROW.fullmatch(TARGETS[label])
    assert match
    return json.loads((ROOT / "docs" / match[1]).read_text().splitlines()[int(match[2]) - 1])


def table_after(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `head`, without its rule."""
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [cells[0], *cells[2:]]


# --- docs/results.md ------------------------------------------------------------------------------


def test_the_tables_are_what_the_rows_give():
    assert results.page() == RESULTS, "run: python docs/make_tables.py"
    assert results.readme() == README, "run: python docs/make_tables.py"


def test_every_number_of_a_table_stands_in_the_row_it_links_to():
    """Read with no help from what wrote them."""
    links = re.findall(r"\[([^\]]+)\]\[(\w+)\]", RESULTS)
    assert len(links) > 50
    for text, label in links:
        row = row_of(label)
        values = [v for v in row.values() if isinstance(v, int | float)]
        if "score" in row:  # a share, beside which tables show how many answers were right
            values.append(row["score"] * row["instances"])
        values += [v / 2**20 for v in values]
        for number in re.findall(r"[\d.,]+", text):
            digits = len(number.partition(".")[2])
            value = float(number.replace(",", ""))
            assert any(round(v, digits) == value for v in values), (text, TARGETS[label])


def test_a_tables_rows_and_columns_say_what_their_numbers_are():
    heads, *lines = table_after(RESULTS, "| nats/token |")
    policies = {name: policy for policy, name in results.POLICIES.items()}
    assert len(lines) == len(policies)
    for name, *cells in lines:
        for head, cell in zip(heads[1:], cells, strict=True):
            label = re.search(r"\]\[(\w+)\]", cell)
            assert label
            row = row_of(label[1])
            assert row["policy"] == policies[name]
            if head != "seconds":
                assert row["start"] == 1024 * int(head.partition("k")[0])


# --- README ---------------------------------------------------------------------------------------


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 90
    assert not re.search(r"^\[\w+\]: ", README, re.MULTILINE)  # no definition for a number


def test_the_readmes_table_says_what_the_rows_say():
    """Computed with no help from what wrote it: means over documents, inside their intervals."""
    path = ROOT / "docs/results/long_context_retrieval/rows.jsonl"
    assert f"({path.relative_to(ROOT)})" in README
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {name: kind for kind, name in results.METHODS.items()}
    heads, *lines = table_after(README, "| copy gain")
    assert [cells[0] for cells in lines] == list(kinds)
    for name, kept, attended, *gains in lines:
        for head, cell in zip(heads[3:], gains, strict=True):
            of_cell = [
                row for row in rows
                if row["policy"].partition(":")[0] == kinds[name]
                and row["place"] == "outside every window"
                and f"after {row['length']:,} tokens" == head
            ]  # fmt: skip
            assert len({row["text_digest"] for row in of_cell}) == len(of_cell) == 12
            mean = sum(row["copy_gain"] for row in of_cell) / 12
            shown, low, high = map(float, re.findall(r"-?[\d.]+", cell))
            assert shown == round(mean, 2)
            assert low < mean < high
        assert kept == f"{of_cell[0]['cache_bytes'] / 1e6:.0f} MB"
        assert attended == f"{of_cell[0]['attended']:,}"


def test_it_has_six_commands_more_and_a_program():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert sum(len(text.splitlines()) for language, text in blocks if language == "sh") == 6
    assert any(language == "python" for language, _ in blocks)


def test_the_tree_names_every_folder():
    tree = re.findall(r"^```text\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)[0]
    heads = [re.split(r" {2,}", line)[0] for line in tree.splitlines()]
    names = set(re.findall(r"[a-z]+", "\n".join(heads)))
    folders = [path.parent.name for path in ROOT.glob("lminf/*/__init__.py")]
    folders += [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    ignored = {"build", "dist", "runs", "shared"}
    folders = {name for name in folders if not name.endswith((".egg-info", "__"))} - ignored
    assert names == folders


# --- Addresses ------------------------------------------------------------------------------------

PAGES = [
    ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_address_of_the_repository_is_that_of_pyproject(page: Path):
    """[project.urls] defines it; pages that a reader copies from repeat it."""
    repository = PROJECT["urls"]["Repository"]
    text = page.read_text()
    for address in re.findall(r"REPOSITORY *= *\W*(https?://[^\s\"'\\]+)", text):
        assert address == repository
    for address in re.findall(r"https?://[^\s\"'\\)]*/lminf\b[^\s\"'\\)]*", text):
        assert address.startswith(repository.removesuffix(".git"))
    for address in PROJECT["urls"].values():
        assert address.startswith(repository.removesuffix(".git"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_extras_that_a_page_installs_exist(page: Path):
    extras = set(PROJECT["optional-dependencies"])
    for names in re.findall(r"lminf\[([\w,-]+)\]", page.read_text()):
        assert set(names.split(",")) <= extras


def test_the_citation_file_is_valid():
    """The keys that the Citation File Format 1.2.0 requires, and this version and licence."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert {"message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert len(citation["references"]) == 3
    for reference in [*citation["references"], citation]:
        assert {"authors", "title", "type"} <= set(reference)
        assert all(author.keys() <= {"given-names", "family-names", "name"}
                   for author in reference["authors"])  # fmt: skip
    identifiers = re.findall(r"\d{4}\.\d{5}", json.dumps(citation["references"]))
    assert set(identifiers) == {"2308.16137", "2407.13623", "2503.04715"}


def test_the_changelog_describes_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", text, re.MULTILINE)
