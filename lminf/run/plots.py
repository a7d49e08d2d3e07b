"""Rows -> figures: labels on lines, log2 lengths, units on axes, panels where lines tangle.

Figures are made without pyplot, so nothing global changes and no display is needed. A figure is
drawn from rows alone. Several rows of one line at one x are draws: the line runs through their
mean, and each is a dot.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from lminf.errors import InputError
from lminf.run import labels, style, tables, ticks
from lminf.run.folder import Row, RunFolder
from lminf.run.style import DASHES, STYLE, Look

WIDTH = 8.6  # inches; text of 10 points is then as large as a page's on GitHub
MAX_LINES = 6  # of one panel
MAX_PANELS = 24
KINDS = ("png", "svg")  # of files: for pages, and for papers
MANY_POINTS = 60  # beyond which a line has no markers


@dataclass
class Line:
    """One line of one panel, in ascending x."""

    name: str
    x: np.ndarray
    y: np.ndarray
    draws: list[tuple[float, float]]  # (x, y) where there are several of one x
    low: np.ndarray
    high: np.ndarray  # of the interval; NaN: none


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
    interval: tuple[str, str] | None = None,
    band: bool = False,
    panel: str | None = None,
    joined: bool = True,
) -> Figure:
    """One line per value of `by`, labelled at its end; `mark` draws a rule at an x.

    `log_x` spaces powers of two evenly. `interval` names the columns of an interval's ends, drawn
    as a bar at each point or as a `band`. Lines share panels by the column `panel`; without it,
    more than six are set apart by family. Points that are not `joined` are a cloud. Rows that lack
    x or y are left out.
    """
    names = dict.fromkeys(str(row.get(by)) for row in rows if _measured(row, x, y))
    looks = style.looks(names)
    panels = (
        {key: list(dict.fromkeys(str(row.get(by)) for row in panel_rows)) for key, panel_rows in
         _groups([row for row in rows if _measured(row, x, y)], panel).items()}
        if panel else _families(looks)
    )  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, grid = panels_of(list(panels), x_label or axis_label(x), y_label or axis_label(y))
        if title and len(grid) == 1:
            grid[0].set_title(title)
        elif title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        values = [row[x] for row in rows if _measured(row, x, y)]
        for axes in grid:
            if log_y:
                axes.set_yscale("log")
            ticks.along_x(axes, values, log_x, most=8 if len(grid) == 1 else 4)
            if log_y:
                heights = [row[y] for row in rows if _measured(row, x, y) and row[y] > 0]
                ticks.decades(axes.yaxis, [end for end in y_limits or () if end] or heights)
        ends = []
        for axes, (key, members) in zip(grid, panels.items(), strict=True):
            panel_rows = [row for row in rows if not panel or str(row.get(panel)) == key]
            lines = _lines(panel_rows, x, y, by, members, interval)
            drawn = [_draw(axes, line, looks[line.name], dash, band=band, joined=joined)
                     for line, dash in zip(lines, _dashes(lines, looks), strict=True)]  # fmt: skip
            ends.append(drawn if joined else [])
            if y_limits is not None:
                axes.set_ylim(*y_limits)
            if mark is not None:
                _rule(axes, mark, mark_label)
        labels.at_ends(figure, grid, ends)
        return figure


def bars(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    by: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    title: str | None = None,
    center: Callable[[list[float]], Any] = np.median,
    interval: tuple[str, str] | None = None,
) -> Figure:
    """Bars from left to right: a group per value of `x`, from above, in it one per value of `by`.

    Several rows of one bar are draws: the bar ends at their `center`, and each is a dot. Of one row
    the columns `interval` are the ends of a line.
    """
    rows = [row for row in rows if _measured(row, x, y)]
    groups = list(dict.fromkeys(row[x] for row in rows))
    names = list(dict.fromkeys(str(row[by]) for row in rows)) if by else [""]
    looks = style.looks(names)
    height = 0.8 / max(len(names), 1)
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, (axes,) = panels_of([""], y_label or axis_label(y), "")
        figure.set_figheight(1.1 + 0.34 * max(2, len(groups) * len(names)))
        axes.set_ylabel(axis_label(x) if x_label is None else x_label)
        if title:
            axes.set_title(title)
        ends, places = [], []
        for index, name in enumerate(names):
            for place, group in enumerate(groups):
                drawn = [r for r in rows if r[x] == group and (not by or str(r[by]) == name)]
                if not drawn:
                    continue
                values = [row[y] for row in drawn]
                level, end = place + (index + 0.5) * height - 0.4, float(center(values))
                label = looks[name].label if name else None
                axes.barh(level, end, height * 0.9, color=looks[name].colour if name else
                          style.PALETTE[0], label=label)  # fmt: skip
                if len(values) > 1:
                    axes.plot(values, [level] * len(values), "o", color="#333333", markersize=3.5,
                              markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
                if interval:
                    values = [drawn[0][column] for column in interval]
                    axes.plot(values, [level] * 2, color="#333333", linewidth=1.2)
                ends.append(end)
                places.append((max(values), level))
        for shown, place in zip(tables.column(ends), places, strict=True):
            axes.annotate(shown, place, xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=9)  # fmt: skip
        axes.set_yticks(range(len(groups)), [_named(group) for group in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.number(value)))
        axes.margins(x=0.09)  # room for the numbers
        if len(names) > 1:  # beside the bars, where it hides none
            handles, named = axes.get_legend_handles_labels()
            different = dict(zip(named, handles, strict=True))
            bare = all(label.replace(".", "").isdigit() for label in different)
            figure.legend(different.values(), different.keys(), loc="outside upper left", ncols=4,
                          frameon=False, title=axis_label(by or "") if bare else None)  # fmt: skip
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
    text: str | None = None,
) -> Figure:
    """A grid of coloured cells, in them the column `text` or the values while they are few.

    Numbers rise, from the left and from below; names stand as they come, the first on top.
    """
    rows = [row for row in rows if _measured(row, x, value) and row.get(y) is not None]
    columns, lines = _in_order(row[x] for row in rows), _in_order(row[y] for row in rows)
    if any(isinstance(line, str) for line in lines):
        lines.reverse()
    grid = np.full((len(lines), len(columns)), np.nan)
    written: dict[tuple[int, int], str] = {}
    for row in rows:
        cell = lines.index(row[y]), columns.index(row[x])
        grid[cell] = row[value]
        written[cell] = f"{row[value]:.3g}" if text is None else str(row[text])
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, (axes,) = panels_of([""], axis_label(x) if x_label is None else x_label,
                                    axis_label(y) if y_label is None else y_label)  # fmt: skip
        figure.set_figheight(1.4 + 0.34 * max(3, len(lines)))
        if title:
            axes.set_title(title)
        image = axes.imshow(
            grid, cmap="cividis", aspect="auto", origin="lower", vmin=limits[0], vmax=limits[1],
            interpolation="nearest",
        )  # fmt: skip
        axes.set_xticks(range(len(columns)), [_named(column) for column in columns])
        axes.set_yticks(range(len(lines)), [_named(line) for line in lines])
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label=value_label or axis_label(value), aspect=14)
        if grid.size <= 150:
            for (line, column), label in written.items():
                colour = (
                    "white" if float(np.asarray(image.norm(grid[line, column]))) < 0.5 else "black"
                )
                axes.text(column, line, label, ha="center", va="center", color=colour, fontsize=8.5)
        return figure


def panels_of(
    titles: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    columns: int = 2,
    height: float = 2.9,
    size: float = 10.5,
) -> tuple[Figure, list[Axes]]:
    """A figure of one panel, or of several with the same axes, and its axes; labels stand outside.

    Make it, and draw, under `matplotlib.rc_context(STYLE)`.
    """
    if len(titles) > MAX_PANELS:
        raise InputError(
            f"a figure of {len(titles)} panels cannot be read, {MAX_PANELS} can; choose fewer rows"
        )
    if len(titles) <= 1:
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        if titles and titles[0]:
            axes.set_title(titles[0])
        return figure, [axes]
    columns = min(columns, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(WIDTH, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for index, axes in enumerate(grid):
        if index >= len(titles):
            axes.remove()
            continue
        axes.set_title(titles[index], fontsize=size)
        if index + columns >= len(titles):  # the last of its column
            axes.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    return figure, grid[: len(titles)]


# --- files ----------------------------------------------------------------------------------------


def save(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a file of that kind, png or svg: the same rows give the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if kind == "svg":
            figure.savefig(buffer, format="svg", bbox_inches="tight",
                           metadata={"Date": None, "Creator": None})  # fmt: skip
            # Verdana is as wide as DejaVu Sans, and is there where that is not.
            text = buffer.getvalue().replace(
                b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif"
            )
            return b"\n".join(line.rstrip() for line in text.split(b"\n"))
        figure.savefig(buffer, format="png", bbox_inches="tight")
    packed = io.BytesIO()
    with Image.open(buffer) as image:  # 256 colours: a third of the bytes
        few = image.convert("RGB").quantize(
            256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    few.save(packed, format="png", optimize=True, dpi=(style.DPI, style.DPI))
    return packed.getvalue()


def write(out: RunFolder, drawn: Figure | Mapping[str, Figure], stem: str) -> list[str]:
    """Saves one figure as plots/<stem>.png, or several by their own stems, and each as .svg beside
    it for papers; returns the names of the former in `out`.
    """
    figures = {stem: drawn} if isinstance(drawn, Figure) else drawn
    for name, figure in figures.items():
        for kind in KINDS:
            out.write(f"plots/{name}.{kind}", save(figure, kind))
    return [f"plots/{name}.png" for name in figures]


def axis_label(column: str) -> str:
    """`bits_per_byte` -> `bits per byte`; give x_label or y_label where this names no unit."""
    units = {
        "length": "length (tokens)",
        "nll": "NLL (nats/token)",
        "position": "position (tokens)",
    }
    return units.get(column, column.replace("_", " "))


# --- lines ----------------------------------------------------------------------------------------


def _measured(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _groups(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(column)), []).append(row)
    return groups or {"": []}


def _families(looks: Mapping[str, Look]) -> dict[str, list[str]]:
    """Names of lines by panel: all in one while they are few, else by family, at most so many."""
    if len(looks) <= MAX_LINES:
        return {"": list(looks)}
    everywhere = [name for name, look in looks.items()
                  if not look.family and style.policy_of(name)]  # fmt: skip
    families: dict[str, list[str]] = {}
    for name, look in looks.items():
        if name not in everywhere:
            families.setdefault(look.family, []).append(name)
    room = MAX_LINES - len(everywhere)
    for family, names in list(families.items()):  # one line alone joins the smallest of the others
        candidates = [name for name in families if name != family]
        smallest = min(candidates, key=lambda name: len(families[name]), default=None)
        if len(names) == 1 and smallest is not None and len(families[smallest]) < room:
            del families[family]
            families[f"{family}, {smallest.lower()}"] = names + families.pop(smallest)
    panels = {}
    for family, names in families.items():
        for count, start in enumerate(range(0, len(names), room), 1):
            title = f"{family} ({count})".strip() if len(names) > room else family
            panels[title] = everywhere + names[start : start + room]
    return panels


def _lines(
    rows: Sequence[Row], x: str, y: str, by: str, names: Iterable[str],
    interval: tuple[str, str] | None,
) -> list[Line]:  # fmt: skip
    points: dict[str, dict[float, list[Row]]] = {name: {} for name in names}
    for row in rows:
        if _measured(row, x, y) and str(row.get(by)) in points:
            points[str(row.get(by))].setdefault(row[x], []).append(row)
    lines = []
    for name, by_x in points.items():
        if not by_x:
            continue
        xs = sorted(by_x)
        ends = [[_mean(row.get(end) for row in by_x[place]) for place in xs]
                for end in interval or ("", "")]  # fmt: skip
        draws = [(place, row[y]) for place in xs for row in by_x[place] if len(by_x[place]) > 1]
        means = [_mean(row[y] for row in by_x[place]) for place in xs]
        lines.append(Line(name, np.array(xs, float), np.array(means), draws, *map(np.array, ends)))
    return lines


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _dashes(lines: Sequence[Line], looks: Mapping[str, Look]) -> list[str]:
    """Another dash for each further line of one colour."""
    seen: dict[str, int] = {}
    dashes = []
    for line in lines:
        colour = looks[line.name].colour
        dashes.append(DASHES[seen.get(colour, 0) % len(DASHES)])
        seen[colour] = seen.get(colour, 0) + 1
    return dashes


def _draw(
    axes: Axes, line: Line, look: Look, dash: str, *, band: bool, joined: bool
) -> tuple[str, tuple[float, float], str]:
    """Draws the line; returns its label, its last point and its colour."""
    colour, many = look.colour, len(line.x) > MANY_POINTS
    axes.plot(
        line.x, line.y, linestyle=dash if joined else "none", color=colour,
        marker="" if many and joined else look.marker, markersize=4 if joined else 3,
        linewidth=0.9 if many else None, alpha=1 if joined else 0.6, markeredgewidth=0,
    )  # fmt: skip
    if line.draws:
        axes.plot(*zip(*line.draws, strict=True), "o", color=colour, markersize=2.5, alpha=0.5,
                  markeredgewidth=0)  # fmt: skip
    known = np.isfinite(line.low) & np.isfinite(line.high)
    if known.any() and band:
        axes.fill_between(line.x[known], line.low[known], line.high[known], color=colour,
                          alpha=0.15, linewidth=0)  # fmt: skip
    elif known.any():
        middle = line.y[known]
        beyond = [np.maximum(middle - line.low[known], 0), np.maximum(line.high[known] - middle, 0)]
        axes.errorbar(line.x[known], middle, beyond, fmt="none", ecolor=colour, elinewidth=1,
                      capsize=2.5, alpha=0.75)  # fmt: skip
    return look.label, (float(line.x[-1]), float(line.y[-1])), colour


# --- axes -----------------------------------------------------------------------------------------


def _named(value: Any) -> str:
    return value if isinstance(value, str) else style.length(value)


def _in_order(values: Iterable[Any]) -> list[Any]:
    different = list(dict.fromkeys(values))
    return different if any(isinstance(v, str) for v in different) else sorted(different)


def _rule(axes: Axes, x: float, label: str) -> None:
    """A dashed line at x, named above the frame, where no curve runs."""
    axes.axvline(x, color="#777777", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        label, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 2),
        textcoords="offset points", ha="center", va="bottom", fontsize=8, color="#666666",
    )  # fmt: skip
    if axes.get_title(loc="left"):
        axes.set_title(axes.get_title(loc="left"), pad=15, fontsize=axes.title.get_fontsize())
