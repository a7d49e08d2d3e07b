"""The commands of the README, run as they are written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(("lminf ", "python "))
]
PROGRAMS = [block for language, block in BLOCKS if language == "python"]


def run(words, folder):
    # Where `make run` puts both commands.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_readme_has_commands_and_a_program():
    assert len(COMMANDS) >= 6
    assert PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_prints_its_result(command, tmp_path):
    assert run(shlex.split(command), tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str.__len__)
def test_the_program_of_the_readme_prints_its_results(program, tmp_path):
    assert len(run([sys.executable, "-c", program], tmp_path).splitlines()) >= 3
