"""A short form of `make fuzz` in every test run."""

import random
from pathlib import Path

import pytest

from tests.fuzz import mutate, run

INPUTS = 40  # of each target: about a second


# A table is fitted in full, which compiles every law's fit.
TARGETS = [
    pytest.param(name, marks=pytest.mark.slow if name == "tables" else ()) for name in run.names()
]


@pytest.mark.parametrize("target", TARGETS)
def test_valid_inputs_are_read(target: str, tmp_path: Path):
    module = run.load(target)
    module.seeds(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        module.read(path)


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_are_read_or_refused_with_one_sentence(target: str, tmp_path: Path):
    module = run.load(target)
    module.seeds(tmp_path)
    for number in range(run.share(target, INPUTS)):
        failure = run.attempt(module, tmp_path, number, seed=1)
        assert failure is None, f"python -m tests.fuzz --target {target} --seed 1 --only {number}"


def test_damage_is_the_same_for_the_same_number(tmp_path: Path):
    for name in ("first", "second"):
        path = tmp_path / name
        path.write_text('{"a": [1, 2, {"b": "c"}], "d": 0.5}')
        mutate.mutate(random.Random(3), path)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
