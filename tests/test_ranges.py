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
from lminf.data.loader import PLANS
from lminf.errors import InputError
from lminf.models.routers import ROUTERS
from lminf.parallel.distributed import Distributed
from lminf.parallel.mesh import MeshShape
from lminf.ranges import Range
from lminf.run import header, request, settings, sweep
from lminf.surgery.lora import LoRA
from lminf.train.ensemble import Replicas
from lminf.train.optim import OPTIMIZERS
from lminf.train.schedules import SCHEDULES, Constant
from lminf.train.stages import Stage
from lminf.train.step import TrainStep
from tests import stated_ranges
from tests.run.resolved import forms


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


# --- Training and experiments ---------------------------------------------------------------------

TRAINING = (
    *PLANS.values(), *OPTIMIZERS.values(), *SCHEDULES.values(), *ROUTERS.values(), LoRA, MeshShape,
    Stage, Distributed, TrainStep, Replicas,
)  # fmt: skip
VALID = {
    "Cosine": {"floor": 1e-5, "warmup": 1},
    "WSD": {"floor": 1e-5, "warmup": 1, "decay": 1},
    "Infinite": {"constant": 1e-4, "floor": 1e-5, "warmup": 1, "cooldown": 1, "anneal": 1},
    "Mixture": {"weights": (1.0,)},
    "Stage": {"tokens": 8, "length": 4, "batch": 2, "schedule": Constant(1e-3)},
    "Rewarm": {"floor": 1e-5, "starts": (5,)},
}


@pytest.mark.parametrize("kind", TRAINING)
def test_every_number_of_training_states_its_range(kind):
    assert stated_ranges.without_range(kind) == []


@pytest.mark.parametrize("kind", [*TRAINING[:-3]])
def test_training_with_a_number_outside_its_range_is_refused(kind):
    peak = {"peak": 1e-3} if kind in SCHEDULES.values() else {}
    valid = kind(**peak, **VALID.get(kind.__name__, {}))
    for field, value in stated_ranges.outside(kind):
        with pytest.raises(InputError, match=rf"{kind.__name__}\.{field} is "):
            dataclasses.replace(valid, **{field: value})


@pytest.mark.parametrize("found", header.experiments(), ids=lambda found: found.name)
def test_every_number_of_a_config_states_its_range(found):
    for form in forms(found.name):
        asked = request.parse(found.name, [f"--config={found.name}:{form}"])
        for name, value in settings.numbers(asked.config):
            texts = isinstance(value, tuple) and any(isinstance(item, str) for item in value)
            assert texts or settings.range_of(name), f"{name} has no range in lminf.run.settings"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clip=-1", r"--config\.clip=-1\.0: give a finite number of at least 0$"),
        ("z_loss=-1e9", r"--config\.z_loss=-1000000000\.0: give a finite number of at least 0 "),
        ("clip=nan", r"--config\.clip=nan: give a finite number"),
        (
            "evaluate.sample=-5",
            r"--config\.evaluate\.sample=-5: give a finite number of at least 0",
        ),
        ("steps=0", r"--config\.steps=0: give "),
        ("seed=-1", r"--config\.seed=-1: give "),
        ("data.held_out=1.0", r"--config\.data\.held_out=1\.0: give .*above 0 and below 1"),
        ("model.rope_base=-inf", r"--config\.model\.rope_base=-inf: give "),
        ("data.batch=99999999999999999999", r"--config\.data\.batch=9+: give "),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name_and_value(change, message):
    with pytest.raises(InputError, match=message):
        request.parse("train_lm", ["--config=train_lm:tiny", f"--config.{change}"])


def test_a_cell_of_a_sweep_is_checked_like_a_command_line():
    asked = request.parse("step_sweep", ["--config=step_sweep:tiny"])
    with pytest.raises(InputError, match=r"--config\.rates=\(0\.001, -1\.0\): give .* for each"):
        sweep.overridden(asked.config, {"rates": (1e-3, -1.0)}, experiment="step_sweep")


@pytest.mark.parametrize("found", header.experiments(), ids=lambda found: found.name)
def test_a_tuple_of_a_config_holds_something_and_nothing_twice(found):
    config = request.parse(found.name, [f"--config={found.name}:tiny"]).config
    for name, value in dict(settings.numbers(config)).items():
        full_name = f"{found.name}.{name}"
        if not isinstance(value, tuple):
            continue
        if full_name not in settings.MAY_BE_EMPTY:
            with pytest.raises(InputError, match=rf"--config\.{name}=\(\): give at least one"):
                request.parse(found.name, [f"--config={found.name}:tiny", f"--config.{name}=()"])
        if value and not {name, full_name} & settings.MAY_REPEAT:
            twice = f"--config.{name}={(value[0], value[0])}"
            with pytest.raises(InputError, match=rf"--config\.{name} holds .* twice"):
                request.parse(found.name, [f"--config={found.name}:tiny", twice])
