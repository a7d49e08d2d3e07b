"""The notebooks: short, stripped, one first cell for all; each runs from its top in tiny form."""

import base64
import io
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from PIL import Image

from lminf.run import style
from notebooks import execute
from tests.test_layers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = 200_000  # bytes, outputs and figures included


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def test_there_are_six():
    names = ("quickstart", "lm_infinite", "vocabulary_law", "step_law", "long_context", "sharding")
    assert [path.stem for path in NOTEBOOKS] == [f"{i:02d}_{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_says_what_to_expect(path):
    cells = read(path).cells
    lines = [
        line
        for source in code_of(path)
        for line in source.splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(cells) <= 25
    assert len(lines) <= 75
    assert path.stat().st_size <= SMALL
    for promise in ("**Question.**", "**Picture to expect.**", "**Time.**"):
        assert promise in cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_results_and_no_traces_of_the_machine(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.execution_count is None
            for output in cell.outputs:
                assert output.output_type != "error"
                assert output.get("name") != "stderr"
    assert any(cell.get("outputs") for cell in notebook.cells)
    text = path.read_text()
    for trace in (str(ROOT), "/home/", "/root/", "/tmp/", "0x7f"):
        assert trace not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names(path):
    # Of a named tuple, _asdict and _replace are public.
    private = re.compile(r"(?:\.|import |, )(_(?!asdict|replace)[a-z]\w*)")
    assert not [name for source in code_of(path) for name in private.findall(source)]


def test_all_install_in_the_same_way():
    firsts = [code_of(path)[0].split("TINY =")[0].strip() for path in NOTEBOOKS]
    assert len(set(firsts)) == 1


def test_the_lines_of_a_kept_figure_can_be_told_apart():
    """Thin lines beside a map of many colours, which would crowd them out of a small palette."""
    i, j = np.indices((256, 256))
    drawn = np.stack([i, j, (i + j) // 2], -1).astype(np.uint8)
    named = [tuple(bytes.fromhex(colour[1:])) for colour in style.PALETTE]
    for index, colour in enumerate(named):
        drawn[10 * index, :60] = colour
    packed = io.BytesIO()
    Image.fromarray(drawn).save(packed, format="png")
    kept = execute.smaller(base64.b64encode(packed.getvalue()).decode())
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(kept))).convert("RGB"), int)
    for index in range(len(named)):
        away = np.abs(np.array(named) - shown[10 * index, 5]).sum(1)
        assert away.argmin() == index


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_top(path, tiny_folder):
    environment = {**os.environ, "LMINF_TINY": str(tiny_folder)}
    # Eight devices that share two cores are no faster than one; 05_sharding asks for them itself.
    environment.pop("XLA_FLAGS")
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks/execute.py", "--check", path],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
