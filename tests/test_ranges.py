"""Every number of a setting has a stated range, and nothing outside it is taken."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import jax
import numpy as np
import pytest

from lminf import ranges
from lminf.config import parse_choice
from lminf.errors import InputError
from lminf.ranges import Range
from tests import stated_ranges


@dataclass(frozen=True)
class Decay:
    rate: Annotated[float, Range(above=0)] = 1.0
    steps: Annotated[int, Range(min=1)] | None = None
    starts: tuple[Annotated[int, Range(min=0)], ...] = ()
    share: Annotated[float, Range(min=0, below=1)] = 0.0
    limit: Annotated[float, Range(min=0, infinite=True)] = math.inf
    width: Annotated[int, Range(min=1)] | tuple[Annotated[int, Range(min=1)], ...] = 1

    def __post_init__(self):
        ranges.check(self)


def test_values_outside_a_range_are_refused_by_field_and_value():
    for field, value in stated_ranges.outside(Decay):
        with pytest.raises(InputError, match=rf"^Decay\.{field} is .*; give a (whole|finite|num)"):
            dataclasses.replace(Decay(), **{field: value})


def test_values_inside_a_range_are_taken():
    Decay(rate=5, steps=3, starts=(0, 7), share=0.5, limit=math.inf, width=(2, 3))
    Decay(rate=np.float32(0.5), steps=np.int32(2))


def test_a_range_does_not_look_at_traced_values():
    assert jax.jit(lambda rate: Decay(rate=rate).rate)(3.0) == 3.0


@pytest.mark.parametrize("text", ["decay:rate=-1", "decay:steps=0", "decay:starts=(1,-1)"])
def test_a_choice_on_the_command_line_is_checked_like_any_other(text):
    with pytest.raises(InputError, match=r"^Decay\.\w+ is "):
        parse_choice(text, {"decay": Decay})


def test_numbers_without_a_range_are_found():
    @dataclass(frozen=True)
    class Loose:
        first: int
        second: tuple[float, ...] = ()
        third: Annotated[int, Range(min=1)] | None = None

    assert stated_ranges.without_range(Loose) == ["Loose.first", "Loose.second"]
    assert stated_ranges.without_range(Decay) == []
