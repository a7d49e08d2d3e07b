"""Figures: names that do not touch, ticks at powers of two, the same bytes from the same rows."""

import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lminf.attention import policy as policies
from lminf.errors import InputError
from lminf.lm import lm  # noqa: F401 -- with all policies
from lminf.run import labels, plots, style

ROWS = [
    {"policy": policy, "length": length, "nll": 2.4 + 0.001 * rank}
    for rank, policy in enumerate(["full", "window", "lambda\nsinks=4", "lm_infinite", "streaming"])
    for length in (512, 1024, 2048)
]


@given(st.lists(st.tuples(st.floats(-500, 500), st.floats(1, 50)), max_size=9))
def test_spread_labels_keep_their_order_and_do_not_touch(wishes):
    wanted, heights = sorted(wish for wish, _ in wishes), [height for _, height in wishes]
    placed = labels.spread(wanted, heights)
    assert len(placed) == len(wanted)
    ends = list(zip(placed, heights, strict=True))
    for (low, below), (high, above) in itertools.pairwise(ends):
        assert high - low >= (below + above) / 2 - 1e-6


def test_labels_that_do_not_touch_stay_where_they_are():
    assert labels.spread([0.0, 20.0, 45.0], [15.0] * 3) == pytest.approx([0.0, 20.0, 45.0])


def test_the_names_beside_five_equal_lines_do_not_overlap():
    figure = plots.curves(ROWS, x="length", y="nll", by="policy", log_x=True, mark=1024)
    figure.draw_without_rendering()
    names = {"Full", "Window", "Lambda", "LM-Infinite", "StreamingLLM"}
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


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_rows_give_the_same_file(kind, start):
    first, second = (plots.save(plots.curves(ROWS[:6], x="length", y="nll", by="policy"), kind)
                     for _ in "ab")  # fmt: skip
    assert first == second
    assert first.startswith(start)
    assert b"<dc:date" not in first


def test_a_png_has_160_dots_an_inch():
    with Image.open(io.BytesIO(plots.save(plots.bars(ROWS[:1], x="policy", y="nll")))) as image:
        assert image.info["dpi"] == pytest.approx((160, 160), abs=0.1)
        assert image.width > 1200


def test_a_policy_has_one_colour_that_no_other_has():
    colours = [look.colour for look in style.POLICIES.values()]
    assert len(set(colours)) == len(colours)
    missing = {name for name in policies.POLICIES if name not in style.POLICIES}
    assert missing == set(), "lminf.run.style.POLICIES names the colour of every policy"
    names = ["streaming:window=64,sinks=4", "StreamingLLM", "streaming asked twice"]
    for others in ([], ["a", "b"], ["full", "window:window=8"]):
        looks = style.looks([*others, *names])
        assert {looks[name].colour for name in names} == {style.POLICIES["streaming"].colour}


def test_more_lines_than_six_are_set_apart_by_family():
    names = ["full", "lm_infinite", "topk", "infllm", "hip", "longheads", "h2o", "tova",
             "sirllm"]  # fmt: skip
    rows = [
        {"policy": name, "length": length, "nll": 1.0} for name in names for length in (64, 128)
    ]
    figure = plots.curves(rows, x="length", y="nll", by="policy")
    shown = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert len(shown) == 2
    assert {"Full", "Top-k", "InfLLM", "HiP", "LongHeads"} in shown
    assert {"Full", "LM-Infinite", "H2O", "TOVA", "SirLLM"} in shown


def test_a_figure_of_too_many_panels_is_refused():
    rows = [{"p": str(i), "x": 1, "y": 1, "by": "a"} for i in range(100)]
    with pytest.raises(InputError, match="100 panels cannot be read"):
        plots.curves(rows, x="x", y="y", by="by", panel="p")


def test_intervals_are_drawn_and_draws_are_averaged():
    rows = [{"by": "a", "x": 64 * x, "y": 0.5 + d, "low": 0.2, "high": 0.9}
            for x in (1, 2) for d in (-0.25, 0.25)]  # fmt: skip
    axes = plots.curves(rows, x="x", y="y", by="by", interval=("low", "high")).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5]
    assert len(axes.lines[1].get_xdata()) == 4
    (bars,) = axes.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.2, 0.9]] * 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (8192, "8k"), (4_194_304, "4M"), (2500, "2,500"), (0.004, "0.004"),
     (3e9, "3B"), (1e21, "10²¹"), (2e17, "2×10¹⁷"), (3e-5, "3×10⁻⁵"), (0, "0")],
)  # fmt: skip
def test_numbers_on_axes_are_as_a_person_writes_them(value, text):
    assert style.length(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [([10 ** (17 + i / 10) for i in range(31)], ["10¹⁷", "10¹⁸", "10¹⁹", "10²⁰"]),
     ([3e9, 7e9, 7e10], ["3B", "7B", "70B"]),
     ([1e-3, 2e-3, 8e-3], ["0.001", "0.002", "0.008"])],
)  # fmt: skip
def test_logarithmic_ticks_can_be_read(values, texts):
    rows = [{"x": x, "y": 1.0, "by": "a"} for x in values]
    axes = plots.curves(rows, x="x", y="y", by="by", log_x=True).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == texts


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
    label = style.short_names([one, other, two, one])
    assert label == {one: "Top-k\ntopk 5", other: "LM-Infinite", two: "Top-k\ntopk 20"}
