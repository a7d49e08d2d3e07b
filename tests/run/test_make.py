"""The commands that a fresh machine starts with, as make would run them."""

import subprocess
import tomllib

import pytest

from tests.test_layers import ROOT


def planned(target: str) -> str:
    """What make would do in a folder without an environment."""
    places = ["VENV=/nowhere/venv", "PARITY_VENV=/nowhere/parity", "AOT_VENV=/nowhere/aot"]
    command = ["make", "-n", target, *places]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("run", ["-m venv /nowhere/venv", "lminf fetch smollm2", "experiments.length_generali"]),
        (
            "test",
            ["install pip -e '.[dev,data]'", 'pytest -m "not slow and not parity and not aot"'],
        ),
        ("slow", ['pytest -m "slow and not parity and not aot"']),
        ("aot", ["--python /nowhere/aot install", "pytest -m aot"]),
        ("parity", ["--python /nowhere/parity install", "pytest -m parity"]),
        ("lint", ["ruff check", "ruff format --check", "pyright"]),
    ],
)
def test_make_sets_up_and_then_runs(target, commands):
    plan = planned(target)
    places = [plan.index(command) for command in commands]
    assert places == sorted(places)


def test_torch_is_asked_for_exactly():
    """Any other way of asking for it pulls gigabytes of CUDA wheels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("parity", "aot"):
        asked = [name for name in project["optional-dependencies"][extra] if "torch" in name]
        assert asked == ["torch==2.13.0"]


def test_the_ci_script_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)
