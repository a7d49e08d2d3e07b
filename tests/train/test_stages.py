"""Stages: what a step is follows from its number, and weights go through as they are."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lminf.attention.rope import Learnt, NoEncoding
from lminf.errors import InputError
from lminf.train.schedules import Constant, Cosine
from lminf.train.stages import Stage, StagedBatches, Stages
from tests.train import making

LENGTH, ROWS = making.LENGTH, making.ROWS
SHORT = Stage(LENGTH * ROWS * 2 + 1, LENGTH, ROWS, Cosine(1e-2, 1e-3, 1))  # 3 steps
LONG = Stage(
    64 * 2 * 4, 64, 2, Constant(1e-3, warmup=2), plan="concat", rope_base=1e6
)  # 4 steps of 2 rows
RUN = Stages((SHORT, LONG))


def test_every_step_is_in_a_stage_and_tokens_add_up():
    listed = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert (RUN.steps, RUN.ends) == (7, (3, 7))
    assert [RUN.find(step) for step in range(7)] == listed
    sizes = [LENGTH * ROWS] * 3 + [128] * 4
    tokens = [0, *itertools.accumulate(sizes)]
    assert [RUN.tokens(steps) for steps in range(8)] == tokens
    assert RUN.find(7) == (1, 4)


def test_each_stage_follows_its_own_schedule_from_its_first_step():
    programs = RUN.programs(making.program())
    for step in range(7):
        index, within = RUN.find(step)
        stage = RUN.stages[index]
        rate = programs[index].learning_rate(np.int32(step))
        assert float(rate) == float(stage.schedule(np.int32(within), stage.steps))


def test_a_rotary_base_changes_what_is_seen_and_no_weight():
    first, second = RUN.programs(making.program())
    assert (first.spec.encoding.base, second.spec.encoding.base) == (1e4, 1e6)
    assert (first.spec.trained_length, second.spec.trained_length) == (16, 64)
    assert second.spec == dataclasses.replace(
        first.spec, trained_length=64, encoding=dataclasses.replace(first.spec.encoding, base=1e6)
    )
    assert jax.tree.map(lambda x: x.shape, first.shapes) == jax.tree.map(
        lambda x: x.shape, second.shapes
    )


@pytest.mark.slow
def test_the_same_weights_see_by_the_base_of_the_stage():
    first, second = RUN.programs(making.program())
    state = making.start(first)
    batch = making.put(first, making.tokens())
    there, beyond = (np.asarray(each.nll(state, batch)) for each in (first, second))
    expected = making.program(shape=second.spec).nll(state, batch)
    np.testing.assert_array_equal(beyond, expected)
    assert np.abs(beyond - there)[:, 1:].max() > 1e-3
    kept = [float(x) for x in (beyond[0, 0], there[0, 0])]
    assert kept[0] == pytest.approx(kept[1], abs=1e-6)  # one token sees no distance


def test_batches_come_from_the_stage_and_are_counted_from_its_first_step():
    class Numbered:
        def __init__(self, name):
            self.name = name

        def batch(self, step):
            return {"tokens": f"{self.name}{step}"}

        def documents(self, step):
            return [step]

    data = StagedBatches(RUN, [Numbered("short"), Numbered("long")])
    names = [data.batch(step)["tokens"] for step in range(7)]
    assert names == ["short0", "short1", "short2", "long0", "long1", "long2", "long3"]
    assert [data.documents(step) for step in (2, 3)] == [[2], [0]]


def test_stages_that_cannot_be_are_refused_in_one_sentence():
    program = making.program()
    learnt = dataclasses.replace(program.spec, encoding=Learnt(length=32, offset=0))
    with pytest.raises(InputError, match="rows of 64 tokens, but the model has 32 learnt posi"):
        dataclasses.replace(LONG, rope_base=None).shape(learnt)
    assert dataclasses.replace(LONG, length=32, rope_base=None).shape(learnt).trained_length == 32
    with pytest.raises(InputError, match=r"rope_base=1e\+06: the model has no rotary positions"):
        LONG.shape(dataclasses.replace(program.spec, encoding=NoEncoding()))
    with pytest.raises(InputError, match=r"warmup=3 is more than the 2 steps of the run"):
        Stage(8, 4, 1, Constant(1.0, warmup=3))
    with pytest.raises(InputError, match="a run has no stage"):
        Stages(())
