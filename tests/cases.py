"""Small inputs that once went wrong, with their right values: ../shared/cases, where present."""

from pathlib import Path

import pytest

CASES = Path(__file__).parents[1] / ".." / "shared" / "cases"


def path(name: str) -> Path:
    """The file or folder of that name below the cases; the test is skipped without it."""
    if not (CASES / name).exists():
        pytest.skip(f"{name} is absent: expected at ../shared/cases/{name}")
    return CASES / name
