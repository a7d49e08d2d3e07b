"""Dataclasses <-> ConfigDict, and choices written on one line."""

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lminf.config import closest, from_config, parse_choice, signature, to_config
from lminf.errors import InputError


class Shape:
    """A base class that is no dataclass itself, as attention policies have."""


@dataclass(frozen=True)
class Dot(Shape):
    pass


@dataclass(frozen=True)
class Box(Shape):
    width: int
    height: int
    limit: int | None = None
    scale: float = 1.0
    filled: bool = False
    style: Literal["plain", "dotted"] = "plain"
    label: str = ""
    sides: tuple[int, ...] = ()

    def __post_init__(self):
        if self.width < 0:
            raise ValueError(f"width={self.width}: give 0 or more")


@dataclass(frozen=True)
class Group(Shape):
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Frame:
    content: Box | Dot
    corner: tuple[int, float] = (0, 0.0)


SHAPES = {"dot": Dot, "box": Box, "group": Group}

boxes = st.builds(
    Box,
    width=st.integers(0, 2**40),
    height=st.integers(),
    limit=st.none() | st.integers(),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    filled=st.booleans(),
    style=st.sampled_from(["plain", "dotted"]),
    label=st.text("abc_-./", max_size=8),
    sides=st.lists(st.integers(), max_size=3).map(tuple),
)
shapes = st.recursive(
    st.just(Dot()) | boxes, lambda inner: st.lists(inner, max_size=3).map(tuple).map(Group)
)


def written(shape) -> str:
    """The shape in the form that parse_choice reads."""
    name = {kind: name for name, kind in SHAPES.items()}[type(shape)]
    fields = []
    for field, value in vars(shape).items():
        if isinstance(value, tuple):
            items = [
                f"({written(item)})" if isinstance(item, Shape) else str(item) for item in value
            ]
            text = f"({','.join(items)})"
        else:
            text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        fields.append(f"{field}={text}")
    return f"{name}:{','.join(fields)}" if fields else name


@given(shapes)
def test_a_dataclass_survives_the_way_through_a_config(shape):
    assert from_config(to_config(shape), SHAPES) == shape


@given(shapes)
def test_what_is_written_on_one_line_is_read_back(shape):
    assert parse_choice(written(shape), SHAPES) == shape


def test_a_union_of_classes_is_told_apart_by_name():
    frame = Frame(Dot(), corner=(1, 2.0))
    assert from_config(to_config(frame), Frame) == frame
    assert from_config(to_config(Box(1, 2)), Box | Dot) == Box(1, 2)


def test_an_optional_field_can_be_overridden_with_its_type():
    config = to_config(Box(1, 2))
    config.limit = 3
    assert from_config(config, Box).limit == 3
    with pytest.raises(TypeError):
        config.limit = "three"


def test_an_integer_serves_as_a_float_field():
    box = parse_choice("box:width=1,height=2,scale=3", SHAPES)
    assert isinstance(box.scale, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "Bax"}, "did you mean 'Box'"),
        ({"widht": 3}, "did you mean 'width'"),
        ({"width": "three"}, "config.width is 'three', but it takes int"),
        ({"width": True}, "config.width is True, but it takes int"),
        ({"style": "doted"}, "takes plain | dotted"),
        ({"sides": (1, "two")}, r"config.sides\[1\] is 'two'"),
        ({"width": -1}, "width=-1: give 0 or more"),
    ],
)
def test_a_bad_section_is_one_sentence_that_names_the_field(change, message):
    section = {**to_config(Box(1, 2)), **change}
    with pytest.raises(InputError, match=message):
        from_config(section, Box | Dot)


def test_a_section_without_a_needed_field_says_which():
    with pytest.raises(InputError, match="lacks height"):
        from_config({"class": "Box", "width": 1}, Box)


def test_a_section_without_a_class_is_refused_where_several_are_possible():
    assert from_config({"width": 1, "height": 2}, Box) == Box(1, 2)
    with pytest.raises(InputError, match="lacks 'class'; use one of dot, box, group"):
        from_config({"width": 1, "height": 2}, SHAPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bx", "no shape is called 'bx'; did you mean 'box'"),
        ("", "no shape is called ''; use dot, box, group"),
        ("box:", "ends in a colon"),
        ("box:width=1", r"lacks height; box\(width: int, height: int, limit: int | none = none"),
        ("box:width=1,heigth=2", "did you mean 'height'"),
        ("box:width=1.5,height=2", "box.width takes int, not '1.5'"),
        ("box:width=1,height=2,scale=nan", "box.scale takes float, not 'nan'"),
        ("box:width=1,height=2,filled=yes", "box.filled takes bool"),
        ("box:width=1,height=2,style=dottd", "did you mean 'dotted'"),
        ("box:width=1,width=2,height=3", "'width' is given twice"),
        ("box:width", "is not field=value"),
        ("box:width=1,height=2,sides=(1,2", "parentheses .* do not match"),
        ("box:width=1,height=2,sides=3", r"takes \(int, …\)"),
        ("box:width=-1,height=2", "width=-1: give 0 or more"),
        ("dot:x=1", "it has no fields"),
        ("group:shapes=(dot,circle)", "no choice is called 'circle'"),
    ],
)
def test_a_bad_choice_is_one_sentence_that_names_the_closest_valid_one(text, message):
    with pytest.raises(InputError, match=message):
        parse_choice(text, SHAPES, what="shape")


def test_choices_nest_in_parentheses():
    group = parse_choice("group:shapes=(dot,(box:width=1,height=2),(group:shapes=(dot)))", SHAPES)
    assert group == Group((Dot(), Box(1, 2), Group((Dot(),))))


def test_a_signature_lists_fields_with_types_and_defaults():
    assert signature(Frame, "frame") == "frame(content: Box | Dot, corner: (int, float) = (0, 0.0))"


def test_the_closest_name_ignores_case_and_dashes():
    assert "'lm_infinite'" in closest("LM-Infinite", ["full", "lm_infinite"])
    assert closest("zzz", ["full", "window"]) == "use full, window"
