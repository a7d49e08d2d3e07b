"""report.md: question, command, table, figure, hardware, time, in that order."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lminf.run import environment, tables
from lminf.run.folder import Row
from lminf.run.header import Header


def compose(
    header: Header,
    *,
    state: str,
    described: Mapping[str, Any],
    config: str,
    table: Sequence[Row],
    figures: Sequence[str],
    seconds: float,
    findings: str = "",
    spent: str = "",
) -> str:
    """The report as Markdown. `state` says how a run failed; empty for one that ended. `findings`
    are an experiment's own sentences, `spent` what its time was made of.
    """
    source = described["source"]
    commit = "not a git checkout"
    if source:
        changed = " with uncommitted changes (environment.json)" if source["diff"] else ""
        commit = f"commit {source['commit']}{changed}"
    packages = ", ".join(
        f"{name} {version}" for name, version in described["packages"].items() if version
    )
    parts = [
        question(header),
        state,
        findings,
        f"```\n{described['command']}\n```",
        tables.markdown(table),
        *(f"![{os.path.basename(path)}]({path})" for path in figures),
        f"Hardware: {environment.hardware(dict(described))}.  \nTime: {seconds:.1f} s{spent}.  \n"
        f"Source: {commit}.  \nVersions: Python {described['python']}, {packages}.",
        f"<details><summary>Configuration</summary>\n\n```json\n{config.strip()}\n```\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def question(header: Header) -> str:
    """The title of a report and what its experiment says of itself."""
    entries = [
        f"- **{key}**: {text}"
        for key, text in header.entries.items()
        if key not in ("Command", "Topic")
    ]
    return "\n\n".join(filter(None, [f"# {header.title or header.name}", "\n".join(entries)]))


QUESTION = re.compile(r"\A# .*\n(?:\n(?:- \*\*.*\n)+)?")
OTHER_CONFIG = re.compile(r"^(?:python|lminf) .*--config=\S+\.py", re.MULTILINE)
TABLE = re.compile(r"^\|.*\n(?:\|.*\n)+", re.MULTILINE)
FIGURES = re.compile(r"(?:^!\[.*\]\(plots/.*\)\n+)+", re.MULTILINE)


def with_results(text: str, *, header: Header, table: Sequence[Row], figures: Sequence[str]) -> str:
    """A report with its table written anew and links to these figures, known ones in their order.

    A report without a table or without figures, as of a run that failed, gets none. What the
    experiment says of itself is the header's, unless the run was of another config file.
    """
    if not OTHER_CONFIG.search(text):
        text = QUESTION.sub(lambda _: question(header) + "\n", text, count=1)
    text = TABLE.sub(lambda _: tables.markdown(table) + "\n", text, count=1)
    known = re.findall(r"^!\[.*\]\((plots/.*)\)$", text, re.MULTILINE)
    drawn = [name for name in known if name in figures]
    drawn += sorted(set(figures) - set(drawn))
    links = "".join(f"![{os.path.basename(name)}]({name})\n\n" for name in drawn)
    return FIGURES.sub(lambda _: links, text, count=1)
