"""Writes the stored configs anew; their diff says what changed: python -m tests.run.resolved"""

import importlib
import json
from pathlib import Path

from lminf.run import header, request

STORED = Path(__file__).parent / "resolved"


def forms(name: str) -> list[str]:
    """The variants of an experiment's config, the full form first."""
    variants = getattr(importlib.import_module(f"lminf.configs.{name}"), "VARIANTS", ("tiny",))
    return list(dict.fromkeys(("", *variants)))


def text_of(name: str) -> str:
    """Every form of the experiment's config, as it is stored."""
    resolved = {}
    for form in forms(name):
        asked = request.parse(name, [f"--config={name}:{form}"])
        assert asked is not None
        resolved[form or "full"] = asked.resolved()
    return json.dumps(resolved, indent=1) + "\n"


def main() -> None:
    STORED.mkdir(exist_ok=True)
    for found in header.experiments():
        (STORED / f"{found.name}.json").write_text(text_of(found.name))


if __name__ == "__main__":
    main()
