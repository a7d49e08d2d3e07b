"""Rows -> figures in one style: colour-blind safe, labels on lines, log2 lengths, units on axes.

Figures are made without pyplot, so nothing global changes and no display is needed. A figure is
drawn from rows alone.
"""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from lminf.run.folder import Row, RunFolder

# Okabe and Ito's palette without its yellow, which is hard to see as a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # beyond seven lines the colours repeat with another dash
STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.8,
    "figure.dpi": 100,
    "savefig.dpi": 160,
}
LABEL_GAP = 1.3  # line heights between neighbouring labels


def short_names(values: Iterable[str]) -> dict[str, str]:
    """`kind:field=value,…` -> its kind, with the settings that tell it from others of its kind."""
    parts = {value: value.partition(":") for value in values}
    short = {}
    for value, (kind, _, settings) in parts.items():
        others = [set(s.split(",")) for v, (k, _, s) in parts.items() if k == kind and v != value]
        own = [s for s in settings.split(",") if not all(s in other for other in others)]
        short[value] = "\n".join([kind, *own] if others else [kind])
    return short


def curves(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    by: str,
    x_label: str | None = None,
    y_label: str | None = None,
    title: str | None = None,
    mark: float | None = None,
    mark_label: str = "training length",
    log_x: bool = False,
    log_y: bool = False,
    y_limits: tuple[float | None, float | None] | None = None,
) -> Figure:
    """One line per value of `by`, labelled at its end; `mark` draws a rule at an x.

    `log_x` spaces powers of two evenly. Rows that lack x or y are left out.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(x_label or axis_label(x), y_label or axis_label(y), title)
        ends = []
        for index, (name, points) in enumerate(_lines(rows, x, y, by).items()):
            colour = PALETTE[index % len(PALETTE)]
            dash = DASHES[index // len(PALETTE) % len(DASHES)]
            axes.plot(*zip(*points, strict=True), dash, color=colour, marker="o", markersize=3.5)
            ends.append((name, points[-1], colour))
        if log_y:
            axes.set_yscale("log")
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        _length_ticks(axes, [row[x] for row in rows if _measured(row, x, y)], log_x)
        if mark is not None:
            _rule(axes, mark, mark_label)
        _label_ends(figure, axes, ends)
        return figure


def bars(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    by: str,
    x_label: str | None = None,
    y_label: str | None = None,
    title: str | None = None,
) -> Figure:
    """Groups of bars: one group per value of `x`, one colour per value of `by`."""
    rows = [row for row in rows if _measured(row, x, y)]
    groups = list(dict.fromkeys(row[x] for row in rows))
    names = list(dict.fromkeys(str(row[by]) for row in rows))
    width = 0.8 / max(len(names), 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(x_label or axis_label(x), y_label or axis_label(y), title)
        for index, name in enumerate(names):
            own = [row for row in rows if str(row[by]) == name]
            places = [groups.index(row[x]) + (index + 0.5) * width - 0.4 for row in own]
            colour = PALETTE[index % len(PALETTE)]
            axes.bar(places, [row[y] for row in own], width * 0.92, color=colour, label=name)
        axes.set_xticks(range(len(groups)), [_tick(group) for group in groups])
        if len(names) > 1:  # above the bars, where it hides none
            figure.legend(loc="outside upper left", ncols=4, frameon=False)
        return figure


def heatmap(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    value: str,
    x_label: str | None = None,
    y_label: str | None = None,
    value_label: str | None = None,
    title: str | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """A grid of coloured cells with the values written in them while they are few.

    Numbers rise, from the left and from below; names stand as they come, the first on top.
    """
    rows = [row for row in rows if _measured(row, x, value) and row.get(y) is not None]
    columns, lines = _in_order(row[x] for row in rows), _in_order(row[y] for row in rows)
    if any(isinstance(line, str) for line in lines):
        lines.reverse()
    grid = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        grid[lines.index(row[y]), columns.index(row[x])] = row[value]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _new_figure(
            axis_label(x) if x_label is None else x_label,
            axis_label(y) if y_label is None else y_label,
            title,
        )
        figure.set_figheight(max(figure.get_figheight(), 1.2 + 0.28 * len(lines)))
        image = axes.imshow(
            grid, cmap="cividis", aspect="auto", origin="lower", vmin=limits[0], vmax=limits[1]
        )
        axes.set_xticks(range(len(columns)), [_tick(column) for column in columns])
        axes.set_yticks(range(len(lines)), [_tick(line) for line in lines])
        figure.colorbar(image, ax=axes, label=value_label or axis_label(value))
        if grid.size <= 150:
            _write_cells(axes, grid, image.norm)
        return figure


def _in_order(values: Iterable[Any]) -> list[Any]:
    different = list(dict.fromkeys(values))
    return different if any(isinstance(v, str) for v in different) else sorted(different)


def save(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    # No software version in the file: the same rows give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def write(out: RunFolder, drawn: Figure | Mapping[str, Figure], stem: str) -> list[str]:
    """Saves one figure as plots/<stem>.png, or several by their own stems; their names in `out`."""
    figures = {stem: drawn} if isinstance(drawn, Figure) else drawn
    return [
        str(out.write(f"plots/{name}.png", save(figure)).relative_to(out.path))
        for name, figure in figures.items()
    ]


def axis_label(column: str) -> str:
    """`bits_per_byte` -> `bits per byte`; give x_label or y_label where this names no unit."""
    units = {
        "length": "length (tokens)",
        "nll": "NLL (nats/token)",
        "position": "position (tokens)",
    }
    return units.get(column, column.replace("_", " "))


def _new_figure(x_label: str, y_label: str, title: str | None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title)
    return figure, axes


def _measured(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _lines(rows: Sequence[Row], x: str, y: str, by: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if _measured(row, x, y):
            lines.setdefault(str(row.get(by)), []).append((row[x], row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def _length_ticks(axes: Axes, values: Sequence[float], log: bool) -> None:
    if log and values:
        axes.set_xscale("log", base=2)
        low, high = np.floor(np.log2(min(values))), np.ceil(np.log2(max(values)))
        step = max(1, int(np.ceil((high - low) / 8)))
        axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in np.arange(low, high + 1, step)]))
        axes.xaxis.set_minor_locator(NullLocator())
    elif values and max(values) > 0 and all(value % 64 == 0 for value in values):  # lengths
        step = 2.0 ** np.ceil(np.log2(max(values) / 8))  # at most eight, at powers of two
        axes.xaxis.set_major_locator(MultipleLocator(max(step, 64)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: Any) -> str:
    """8192 -> 8k: lengths are powers of two, so k is 1,024; other numbers stay as they are."""
    if isinstance(value, str):
        return value
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:,.0f}k"
    return f"{value:,.10g}"


def _rule(axes: Axes, x: float, label: str) -> None:
    axes.axvline(x, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    place = axes.get_xaxis_transform()
    axes.annotate(
        label, (x, 1), xycoords=place, xytext=(-4, -2), textcoords="offset points",
        rotation=90, ha="right", va="top", fontsize=8, color="#777777",
    )  # fmt: skip


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[str, tuple, str]]) -> None:
    """Each line's name beside its last point, moved up or down until no two names touch."""
    if not ends:
        return
    line_height = LABEL_GAP * matplotlib.rcParams["font.size"]  # points
    low, high = axes.get_ylim()
    to_points = 72 / figure.dpi
    figure.draw_without_rendering()  # settles the layout, and with it where a value lands
    box = axes.get_window_extent()
    ends = sorted(ends, key=lambda end: end[1][1])
    wanted = []
    for _, (x, y), _ in ends:
        pixels = axes.transData.transform((x, min(max(y, low), high)))[1]
        wanted.append((pixels - box.y0) * to_points)
    heights = [line_height * (1 + name.count("\n")) for name, _, _ in ends]
    placed = spread(wanted, heights)
    for (name, (x, y), colour), wish, offset in zip(ends, wanted, placed, strict=True):
        fraction = offset / (box.height * to_points)
        axes.annotate(
            name, (x, min(max(y, low), high)), xytext=(1.03, fraction), textcoords="axes fraction",
            color=colour, va="center", ha="left", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3,
                "alpha": 0.7 if abs(offset - wish) > 2 else 0.0,
            },
        )  # fmt: skip


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of labels of these heights that do not overlap, in the order of `wanted` (ascending).

    Least squares: neighbours that would touch form a block centred on the mean of their wishes.
    """
    offsets = [0.0]  # of each label above the first, were they all stacked
    for below, above in itertools.pairwise(heights):
        offsets.append(offsets[-1] + (below + above) / 2)
    blocks: list[tuple[float, int]] = []  # sum of (wish - offset), and count
    for wish, offset in zip(wanted, offsets, strict=False):
        total, count = wish - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count))
    starts = [total / count for total, count in blocks for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets, strict=False)]


def _write_cells(axes: Axes, grid: np.ndarray, norm: Any) -> None:
    for line, column in np.argwhere(np.isfinite(grid)):
        value = grid[line, column]
        colour = "white" if norm(value) < 0.5 else "black"
        axes.text(column, line, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
