"""What an experiment asks and how long it takes, read from the docstring of its config file.

The first paragraph is the title; then lines of `Keyword   text`, continued by indented lines. The
file is parsed, not imported: listing experiments runs none of their code.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lminf.config import closest
from lminf.errors import InputError

ROOT = Path(__file__).resolve().parents[1]  # the package: configs/ is a link in it, or a folder
CONFIGS = ROOT / "configs"
MODULE = re.compile(r"python -m experiments\.(\w+)")
ENTRY = re.compile(r"([A-Z]\w*)(?:: *| {2,})(\S.*)")


@dataclass(frozen=True)
class Header:
    name: str  # of the experiment: the stem of its config file
    title: str
    entries: dict[str, str]  # Topic, Question, Paper, Command, Time, Tiny, Expected, …


def read(path: Path) -> Header:
    """The header of a config file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise InputError(f"cannot read the config file {path}: {error}") from error
    title, _, body = (ast.get_docstring(tree) or "").partition("\n\n")
    entries: dict[str, str] = {}
    latest = None
    for line in body.splitlines():
        match = ENTRY.fullmatch(line.rstrip())
        if match:
            latest = match[1]
            entries[latest] = match[2]
        elif latest and line.startswith(" "):
            entries[latest] += " " + line.strip()
        elif line.strip():
            latest = None
    entries = {
        key: MODULE.sub(lambda match: command(match[1]), text) for key, text in entries.items()
    }
    return Header(path.stem, " ".join(title.split()), entries)


def command(experiment: str) -> str:
    """What starts an experiment from here: `python -m experiments.NAME` in a checkout, where the
    files are that one would change, and `lminf run NAME` anywhere else.
    """
    in_checkout = Path("experiments").resolve() == (ROOT / "experiments").resolve()
    return f"python -m experiments.{experiment}" if in_checkout else f"lminf run {experiment}"


def experiments(names: Sequence[str] = (), *, configs: Path = CONFIGS) -> list[Header]:
    """The headers of these experiments, or of all: the config files that ask a question."""
    headers = {path.stem: read(path) for path in sorted(configs.glob("[!_]*.py"))}
    described = {name: header for name, header in headers.items() if "Question" in header.entries}
    for name in names:
        if name not in described:
            raise InputError(f"there is no experiment {name!r}; {closest(name, described)}")
    return [described[name] for name in names or described]
