"""The figures in docs/: drawn from the rows beside them, and fit to be shown."""

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lminf.commands import show
from lminf.run import header, plots, tables
from lminf.run import report as report_of

DOCS = Path(__file__).parents[2] / "docs"
RUNS = sorted(path.parent for path in DOCS.glob("*/*/rows.jsonl"))
FAST = ("step_law", "train_throughput", "passkey", "length_generalization")  # few figures each
LEAST_INCHES = 1.5  # of a panel
LONGEST_TICK = 9


@pytest.fixture(
    scope="module",
    params=[pytest.param(run, id=run.name, marks=[] if run.name in FAST else pytest.mark.slow)
            for run in RUNS],
)  # fmt: skip
def kept(request) -> tuple[Path, dict[str, bytes], set[str]]:
    """A run, its figures drawn anew, and what there is to complain of."""
    reading = show.read(str(request.param))
    drawn, found = {}, set()
    for stem, figure in reading.figures().items():
        figure.draw_without_rendering()
        found |= {f"{stem}: {fault}" for fault in faults(figure)}
        drawn[stem] = plots.save(figure, "svg")
    assert not reading.damage
    return request.param, drawn, found


def test_the_kept_figures_are_what_the_code_draws(kept):
    run, figures, _ = kept
    for stem, drawn in figures.items():
        assert (run / f"plots/{stem}.png").read_bytes().startswith(b"\x89PNG")
        there = (run / f"plots/{stem}.svg").read_bytes()
        again = f"lminf show {run.relative_to(DOCS.parent)} --redraw"
        assert said(drawn) == said(there), f"{stem} is not what its rows give; {again}"


def said(svg: bytes) -> tuple[list[bytes], int]:
    """All text of a drawing and how many shapes it has: the same for every version of matplotlib
    that draws the same.
    """
    return re.findall(rb"<text[^>]*>(.*?)</text>", svg, re.DOTALL), svg.count(b"<use ")


def test_kept_figures_can_be_read(kept):
    _, _, found = kept
    assert found == set()


def test_reports_show_every_figure_and_the_table_of_the_rows(kept):
    run, *_ = kept
    report = (run / "report.md").read_text()
    assert tables.markdown(show.read(str(run)).summary()) in report
    config = header.CONFIGS / f"{show.read(str(run)).experiment}.py"
    assert report_of.question(header.read(config)) in report
    links = set(re.findall(r"!\[.*\]\(plots/(.*)\)", report))
    assert links == {path.name for path in (run / "plots").glob("*.png")}


def faults(figure: Figure) -> Iterator[str]:
    """What a reader would complain of."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for axes in panels:
        box = axes.get_window_extent()
        if min(box.width, 1.4 * box.height) < LEAST_INCHES * figure.dpi:
            yield f"a panel of {box.width:.0f} x {box.height:.0f} dots"
        texts = [text for text in axes.texts if text.get_text()]
        yield from overlaps(texts, "labels")
        for other in panels:
            if other is not axes and any(
                extent(text).overlaps(other.get_window_extent()) for text in texts
            ):
                yield "a label lies on another panel"
        names = {text.get_text() for text in texts if text.get_position()[0] == 1.03}
        if len(names) > plots.MAX_LINES:
            yield f"{len(names)} lines in one panel"
        yield from axis_faults(figure, axes)
    for legend in [*figure.legends, *(axes.get_legend() for axes in panels)]:
        entries = [text.get_text() for text in legend.get_texts()] if legend else []
        if entries and all(bare(entry) for entry in entries) and not legend.get_title().get_text():
            yield f"a legend of bare numbers: {entries}"


def axis_faults(figure: Figure, axes: Axes) -> Iterator[str]:
    supers = {"x": figure.get_supxlabel(), "y": figure.get_supylabel()}
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        label = axis.get_label().get_text() or supers[name]
        ticks = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
        low, high = sorted(axis.get_view_interval())
        inside = [t for t in ticks if low <= t.get_position()[name == "y"] <= high]
        if all(tick.get_text()[-1:].isdigit() or bare(tick.get_text()) for tick in inside):
            if not re.search(r"\(.+\)", label):
                yield f"{name} axis without a unit: {label!r}"
            for tick in inside:
                text = tick.get_text()
                if len(text) > LONGEST_TICK or "e+" in text or "math" in text or "000000" in text:
                    yield f"an unreadable tick {text!r}"
        yield from overlaps(inside, f"{name} ticks")


def extent(text: Text) -> Bbox:
    """Of the words, without the line that leads to them."""
    return Text.get_window_extent(text)


def bare(text: str) -> bool:
    return re.fullmatch(r"[−-]?[\d.,]+[kMB]?", text) is not None


def overlaps(texts: list[Text], what: str) -> Iterator[str]:
    for one, other in itertools.combinations(texts, 2):
        if extent(one).overlaps(extent(other)):
            yield f"{what} overlap: {one.get_text()!r} and {other.get_text()!r}"


def test_a_bad_figure_is_found_out():
    rows = [{"a": f"{i} line with a long name of its own", "x": 4**i * 1000, "y": i % 3}
            for i in range(9)]  # fmt: skip
    figure = Figure(figsize=(1.5, 1.5))
    axes = figure.add_subplot()
    for row in rows:
        axes.plot([row["x"]], [row["y"]], "o", label=str(row["y"]))
        axes.annotate(row["a"], (row["x"], row["y"]), xytext=(1.03, row["y"] / 3),
                      textcoords="axes fraction")  # fmt: skip
    axes.legend()
    figure.draw_without_rendering()
    found = " ".join(faults(figure))
    for fault in ("a panel of", "labels overlap", "9 lines", "bare numbers", "without a unit"):
        assert fault in found
    several = plots.curves(rows, x="x", y="y", by="a", x_label="x (m)", y_label="y (s)")
    several.draw_without_rendering()
    assert len(several.axes) == 2
    assert not list(faults(several))


def test_every_experiment_that_is_kept_has_a_module():
    assert len(RUNS) > 10
    for run in RUNS:
        importlib.import_module(f"lminf.experiments.{show.read(str(run)).experiment}")
