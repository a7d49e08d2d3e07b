"""Schedules: their dependencies, bubbles and peak activations, against the papers' formulas."""

import dataclasses

import pytest

from lminf.errors import InputError
from lminf.parallel import schedules, simulator
from lminf.parallel.schedules import SCHEDULES


def costs(name, p, vocab="last_stage", m=None, duration=None):
    duration = duration or simulator.typical_duration(name)
    made = schedules.build(name, devices=p, microbatches=m or 4 * p, vocab=vocab, duration=duration)
    return simulator.simulate(made)


# Of device 0, in microbatches. Source: Yeung et al. 2024, arXiv:2411.05288, table 2.
PEAKS = {
    "last_stage": lambda p: p,
    "two_barriers": lambda p: p + 2,
    "one_barrier": lambda p: p + 1,
    "interlaced": lambda p: 3 * p // 2,
}


@pytest.mark.parametrize("vocab", PEAKS)
@pytest.mark.parametrize("p", [4, 8])
def test_1f1b_has_the_same_bubble_with_any_vocabulary_and_the_published_peak(vocab, p):
    for m in (4 * p, 4 * p + 3):
        found = costs("1f1b", p, vocab, m)
        assert set(found.idle) == {(p - 1) * (4 + 8)}  # (p - 1)(F + B), on every device
        assert found.peak[0] == max(found.peak) == PEAKS[vocab](p)


@pytest.mark.parametrize("vocab", ["one_barrier", "two_barriers"])
def test_one_microbatch_less_in_flight_makes_a_larger_bubble(vocab, monkeypatch):
    """Each barrier costs a microbatch, and not less."""
    form = SCHEDULES["1f1b"]._replace(max_in_flight=lambda p, d, m: (p - d - 1, p - d - 1))
    monkeypatch.setitem(SCHEDULES, "1f1b", form)
    assert costs("1f1b", 8, vocab).idle[0] > 7 * (4 + 8)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_the_other_schedules_have_their_published_bubbles_and_peaks(p):
    assert set(costs("gpipe", p).idle) == {(p - 1) * 12}
    assert costs("gpipe", p).peak[0] == 4 * p
    assert set(costs("interleaved", p).idle) == {(p - 1) * 12 // 2}  # two chunks halve it
    assert costs("interleaved", p).peak[0] == (3 * p - 1) / 2
    # Of the first schedule of arXiv:2401.10241: (p - 1)(F + B - W) at the memory of 1F1B.
    assert set(costs("zero_bubble", p).idle) == {(p - 1) * 4}
    assert max(costs("zero_bubble", p).peak) == p
    # arXiv:2405.15362: half of the memory of 1F1B and a constant, the same on all devices.
    assert set(costs("v_half", p).peak) == {p / 2 + 1}
    assert max(costs("v_half", p).idle) < (p - 1) * 12


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("vocab", ["last_stage", "one_barrier", "two_barriers"])
def test_every_schedule_keeps_every_dependency_at_any_pace(name, vocab):
    for p, m in ((1, 3), (2, 2), (3, 6), (5, 10)):
        for ticks in ((1, 1, 1, 1, 1), (2, 3, 1, 2, 1), (1, 2, 2, 5, 3)):
            pace = dict(zip("FBWST", ticks, strict=True))
            costs(name, p, vocab, m, duration=lambda kind, device, pace=pace: pace[kind])


def test_a_pass_that_starts_before_its_inputs_is_found():
    made = schedules.build("1f1b", devices=3, microbatches=4, vocab="one_barrier")
    simulator.simulate(made)
    for moved in (each for each in made.passes if each.tick):
        passes = (*(each for each in made.passes if each != moved), moved._replace(tick=0))
        with pytest.raises(ValueError, match=r"starts before|overlap"):
            simulator.simulate(dataclasses.replace(made, passes=passes))
    with pytest.raises(ValueError, match="missing"):
        simulator.simulate(dataclasses.replace(made, passes=made.passes[1:]))


def test_a_larger_vocabulary_slows_1f1b_with_its_last_stage_and_not_a_divided_one():
    p, m = 4, 16

    def ticks(vocab, head):
        """`head`: ticks of S and T of the whole vocabulary, each."""
        extra = head if vocab == "last_stage" else 0
        pace = {"F": 12, "B": 24, "S": head // p, "T": head // p}
        return costs(
            "1f1b", p, vocab, m,
            lambda kind, device: pace[kind] + extra * (device == p - 1 and kind in "FB"),
        ).ticks  # fmt: skip

    for head in (12, 48):
        assert ticks("last_stage", head) >= m * (36 + 2 * head)
        for vocab in ("one_barrier", "two_barriers"):
            assert ticks(vocab, head) == (m + p - 1) * 36 + 2 * m * head // p


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "1f2b"}, "no pipeline schedule is called '1f2b'; did you mean '1f1b'"),
        ({"vocab": "one_barier"}, "no pipeline vocabulary .* did you mean 'one_barrier'"),
        ({"microbatches": 3}, "1f1b over 4 stages needs at least 4 microbatches, not 3"),
        ({"name": "interleaved", "microbatches": 6}, "groups of 4, .* does not divide 6"),
        ({"name": "gpipe", "vocab": "interlaced"}, "gpipe has no interlaced form"),
    ],
)
def test_what_is_no_schedule_is_one_sentence(changes, message):
    valid = {"name": "1f1b", "devices": 4, "microbatches": 8, "vocab": "one_barrier"}
    with pytest.raises(InputError, match=message):
        schedules.build(**{**valid, **changes})
