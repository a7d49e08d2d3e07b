"""Figures: names that do not touch, ticks at powers of two, the same bytes from the same rows."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lminf.run import plots

ROWS = [
    {"policy": policy, "length": length, "nll": 2.4 + 0.001 * rank}
    for rank, policy in enumerate(["full", "window", "lambda\nsinks=4", "lm_infinite", "streaming"])
    for length in (512, 1024, 2048)
]


@given(st.lists(st.tuples(st.floats(-500, 500), st.floats(1, 50)), max_size=9))
def test_spread_labels_keep_their_order_and_do_not_touch(labels):
    wanted, heights = sorted(wish for wish, _ in labels), [height for _, height in labels]
    placed = plots.spread(wanted, heights)
    assert len(placed) == len(wanted)
    ends = list(zip(placed, heights, strict=True))
    for (low, below), (high, above) in itertools.pairwise(ends):
        assert high - low >= (below + above) / 2 - 1e-6


def test_labels_that_do_not_touch_stay_where_they_are():
    assert plots.spread([0.0, 20.0, 45.0], [15.0] * 3) == pytest.approx([0.0, 20.0, 45.0])


def test_the_names_beside_five_equal_lines_do_not_overlap():
    figure = plots.curves(ROWS, x="length", y="nll", by="policy", log_x=True, mark=1024)
    figure.draw_without_rendering()
    names = {row["policy"] for row in ROWS}
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() in names]
    assert len(boxes) == 5
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_lengths_are_marked_at_powers_of_two_with_units():
    axes = plots.curves(ROWS, x="length", y="nll", by="policy", log_x=True).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["512", "1k", "2k"]
    even = [{**row, "length": 8 * row["length"]} for row in ROWS]
    axes = plots.curves(even, x="length", y="nll", by="policy").axes[0]
    assert {"4k", "8k", "16k"} <= {text.get_text() for text in axes.get_xticklabels()}
    assert axes.get_xlabel() == "length (tokens)"
    assert axes.get_ylabel() == "NLL (nats/token)"


def test_the_same_rows_give_the_same_picture():
    first, second = (plots.save(plots.curves(ROWS, x="length", y="nll", by="policy")) for _ in "ab")
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_rows_without_a_measurement_are_left_out():
    rows = [*ROWS, {"policy": "full", "length": 4096, "nll": None}, {"policy": "full"}]
    figure = plots.curves(rows, x="length", y="nll", by="policy")
    assert max(figure.axes[0].lines[0].get_xdata()) == 2048


def test_bars_and_heatmap_show_every_row():
    bars = plots.bars(ROWS, x="length", y="nll", by="policy", y_label="NLL (nats/token)")
    assert len(bars.axes[0].patches) == len(ROWS)
    heat = plots.heatmap(ROWS, x="length", y="policy", value="nll")
    assert len(heat.axes[0].texts) == len(ROWS)
    names = list(dict.fromkeys(row["policy"] for row in ROWS))
    assert [tick.get_text() for tick in heat.axes[0].get_yticklabels()] == names[::-1]  # upwards


def test_no_rows_give_an_empty_figure():
    plots.save(plots.curves([], x="length", y="nll", by="policy", log_x=True, mark=8))


def test_policies_of_one_kind_are_told_apart_by_what_differs():
    one, two, other = "topk:window=8,topk=5", "topk:window=8,topk=20", "lm_infinite:window=400"
    label = plots.short_names([one, other, two, one])
    assert label == {one: "topk\ntopk=5", other: "lm_infinite", two: "topk\ntopk=20"}
