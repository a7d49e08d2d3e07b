"""The constants of papers, which stand beside this module as JSON files."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def read(name: str) -> Any:
    """What the file of that name holds."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))
