"""Executes notebooks where they lie and keeps of them what a reader needs: `make notebooks`.

    python notebooks/execute.py [--check] [NAME.ipynb …]

Without names: all of them. `--check` writes nothing, and shows only whether they run. The model of
every notebook is LMINF_TINY where that is set: the folder of a small model.
"""

import argparse
import base64
import io
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
# Whatever made them, the files name one plain kernel, so that Colab, a laptop and CI can take them.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PROGRESS = re.compile(r"\r[^\n]*\n?")
KEPT = ("text/plain", "text/html", "text/markdown", "image/png")


def execute(path: Path, *, limit: int) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; no cell may take longer than `limit` seconds."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=limit, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()
    return strip(notebook)


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same cells and results, without counts, times, progress lines and the editor's notes."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = joined([stripped(output) for output in cell.outputs])
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without what went to stderr; printed text in one piece, without lines that overwrote
    themselves to show progress.
    """
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = PROGRESS.sub("", output.text)
    return [output for output in kept if output.output_type != "stream" or output.text]


def stripped(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "data" in output:
        # A figure's text is its address in memory.
        kept = [name for name in KEPT if name in output.data]
        if "image/png" in kept:
            kept = ["image/png"]
            output.data["image/png"] = smaller(output.data["image/png"])
        output.data = nbformat.from_dict({name: output.data[name] for name in kept})
        output.metadata = nbformat.from_dict({})
    if output.output_type == "execute_result":
        output.execution_count = None
    return output


def smaller(png: str) -> str:
    """The figure in 128 colours: a third of the bytes, and lines and labels as they were."""
    packed = io.BytesIO()
    figure = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    # Not the default method, which gives one colour to two thin lines where a map needs many.
    figure = figure.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    figure.save(packed, format="png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one cell")
    arguments = parser.parse_args()
    for path in arguments.names or sorted(FOLDER.glob("*.ipynb")):
        started = time.monotonic()
        notebook = execute(path.resolve(), limit=arguments.limit)
        if not arguments.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
