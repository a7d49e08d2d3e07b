"""Where the ticks of an axis stand, and what they say: lengths at powers of two, few, readable."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from lminf.run import style


def along_x(axes: Axes, values: Sequence[float], log_x: bool, most: int) -> None:
    """At most so many ticks where these values lie: at powers of two if they are lengths."""
    if log_x and values and min(values) > 0:
        axes.set_xscale("log", base=2)
        logarithmic(axes.xaxis, values, most)
    elif values and max(values) > 0 and all(value % 64 == 0 for value in values):  # lengths
        step = 2.0 ** np.ceil(np.log2(max(values) / most))  # at powers of two
        axes.xaxis.set_major_locator(MultipleLocator(max(step, 64)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.length(value)))
    elif values and max(values) >= 1000:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.number(value)))


def logarithmic(axis: Axis, values: Iterable[float], most: int = 8) -> None:
    """Ticks of a logarithmic axis: powers of two for lengths, the values themselves where they are
    few, decades otherwise.
    """
    different = sorted(set(values))
    low, high = different[0], different[-1]
    axis.set_minor_locator(NullLocator())
    if low >= 1 and high <= 2.0**24:
        first, last = np.floor(np.log2(low)), np.ceil(np.log2(high))
        step = max(1, int(np.ceil((last - first) / most)))
        axis.set_major_locator(FixedLocator([2.0**e for e in np.arange(first, last + 1, step)]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: style.length(value)))
    elif len(different) <= 14 and high / low < 1e4:
        axis.set_major_locator(FixedLocator(different[:: -(-len(different) // most)]))
        shown = style.power if high >= 1e11 else style.number  # FLOPs, or counts
        axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    else:
        decades(axis, different)


def decades(axis: Axis, values: Iterable[float]) -> None:
    """Four to eight ticks: powers of ten over many decades, steps within them over few."""
    low, high = math.log10(min(values, default=1)), math.log10(max(values, default=10))
    first, last = math.floor(low - 0.1), math.ceil(high + 0.1)
    step = max(1, -(-(last - first) // 8))
    for within in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), np.arange(1, 10, 0.2)):
        ticks = [f * 10.0**e for e in range(first, last + 1, step) for f in within]
        ticks = [tick for tick in ticks if low - 0.1 <= math.log10(tick) <= high + 0.1]
        if len(ticks) >= 4 or step > 1:
            break
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 9)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: style.number(float(f"{value:.6g}"))))
