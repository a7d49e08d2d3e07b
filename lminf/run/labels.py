"""Names of lines beside their ends, where they need no legend and do not touch."""

import itertools
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABEL_GAP, LINE = 1.3, 1.4  # heights of a label of one line, and of each further line, in ems


def at_ends(
    figure: Figure, grid: Sequence[Axes], ends: Sequence[Sequence[tuple[str, tuple, str]]]
) -> None:
    """Each line's name beside its last point, moved up or down until no two names touch."""
    figure.draw_without_rendering()  # settles the layout, and with it where a value lands
    size = matplotlib.rcParams["font.size"] - (1 if len(grid) > 1 else 0)
    for axes, of_panel in zip(grid, ends, strict=True):
        _in_panel(axes, of_panel, size, 72 / figure.dpi)


def _in_panel(
    axes: Axes, ends: Sequence[tuple[str, tuple, str]], size: float, to_points: float
) -> None:
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    right = max((x for _, (x, _), _ in ends), default=0)
    ends = sorted(ends, key=lambda end: end[1][1])
    centres = []
    for _, (x, y), _ in ends:
        pixels = axes.transData.transform((x, min(max(y, low), high)))[1]
        centres.append((pixels - box.y0) * to_points)
    heights = [size * (LABEL_GAP + LINE * name.count("\n")) for name, _, _ in ends]
    placed = spread(centres, heights)
    for (name, (x, y), colour), wish, offset in zip(ends, centres, placed, strict=True):
        led = x < right or abs(offset - wish) > 2
        axes.annotate(
            name, (x, min(max(y, low), high)),
            xytext=(1.03, offset / (box.height * to_points)), textcoords="axes fraction",
            color=colour, va="center", ha="left", annotation_clip=False, fontsize=size,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3,
                "alpha": 0.6,
            } if led else None,
        )  # fmt: skip


def spread(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of labels of these heights that do not overlap, in the order of the wished `centres`.

    Least squares: neighbours that would touch form a block centred on the mean of their wishes.
    """
    offsets = [0.0]  # of each label above the first, were they all stacked
    for below, above in itertools.pairwise(heights):
        offsets.append(offsets[-1] + (below + above) / 2)
    blocks: list[tuple[float, int]] = []  # sum of (wish - offset), and count
    for wish, offset in zip(centres, offsets, strict=False):
        total, count = wish - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            block = blocks.pop()
            total, count = total + block[0], count + block[1]
        blocks.append((total, count))
    starts = [total / count for total, count in blocks for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets, strict=False)]
