"""The Triton interpreter in a process of its own, asked by the tests of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import _import_hook

ROOT = Path(__file__).parents[3]


def _leave_kernels_alone() -> None:
    """No shape checks around Triton kernels: what is compiled is their source, in their globals."""
    for finder in sys.meta_path:
        if isinstance(finder, _import_hook._JaxtypingFinder):
            checked = finder.should_instrument
            finder.should_instrument = lambda name, checked=checked: (
                not name.rpartition(".")[2].startswith("triton_") and checked(name)
            )


_leave_kernels_alone()


@pytest.fixture(scope="session")
def interpreter():
    """Relative errors of a named check of `checks.py`."""
    pytest.importorskip("triton", reason="the interpreter gate needs triton")
    pytest.importorskip("torch", reason="the interpreter gate needs torch")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.triton.interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answered = process.stdin, process.stdout

    def errors(name: str) -> dict[str, float]:
        print(name, file=asked, flush=True)
        line = answered.readline()
        assert line, "the interpreter's process ended"
        reply = json.loads(line)
        assert "failure" not in reply, reply["failure"]
        return reply["errors"]

    yield errors
    asked.close()
    answered.close()
    process.wait(timeout=30)
