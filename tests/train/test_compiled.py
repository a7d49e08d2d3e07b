"""Plans in words, and the step compiled for devices that are not here (`make aot`)."""

import json

import pytest

from lminf import cli
from lminf.commands import plan
from lminf.parallel import hardware, topology

TINY = ("plan", "--config=train_lm:tiny", "--devices=v5e-4")


@pytest.mark.aot
def test_the_step_compiled_for_a_tpu_holds_what_the_formula_says(capsys):
    cli.main([*TINY, "--json"])
    found = json.loads(capsys.readouterr().out)
    # Copies on each chip: of slices narrower than 128, a chip pads the last axis to that.
    state = found["params_bytes"] + found["optimizer_bytes"]
    assert found["compiled_state_bytes"] == pytest.approx(state, rel=0.02)
    assert found["compiled_total_bytes"] < found["device_memory_bytes"]


def test_a_plan_without_a_compiler_says_so_and_speaks_in_units(capsys, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    cli.main(list(TINY))
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].islower())
    assert "lminf[aot]" in err
    assert (lines["parameters"], lines["fits"]) == ("820 k", "yes")
    assert lines["total"].endswith("MB")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("total_bytes", 757_000_000, "757 MB"), ("tokens", 20_971_520_000, "21 B"),
     ("flops", 1.56e20, "1.56e+20"), ("trained_length", 2048, "2,048"), ("fits", True, "yes"),
     ("hours", 2.1534, "2.15"), ("bytes", 16, "16 B"), ("mfu", 0.4, "0.4")],
)  # fmt: skip
def test_values_have_units_that_leave_few_digits(key, value, text):
    assert plan.spelled(key, value) == text


def test_slices_of_chips_are_even_grids():
    assert topology.grid_of(256, 2) == (16, 16)
    assert topology.grid_of(8, 2) == (2, 4)
    assert topology.grid_of(4, 3) == (2, 2, 1)
    assert topology.grid_of(16, 3) == (2, 2, 4)


def test_what_cannot_be_compiled_for_says_why():
    assert "no compiler for a100" in topology.missing(hardware.parse("a100x8"))
