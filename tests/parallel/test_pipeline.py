"""A pipelined step beside the same step without a pipeline, its order, its memory, its refusals."""

import dataclasses
import functools
from collections import defaultdict

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.models import spec
from lminf.objectives.preference import DPO
from lminf.objectives.terms import CrossEntropy, ZLoss
from lminf.parallel import mesh, partition, pipeline
from lminf.parallel.pipeline_device import Device
from lminf.parallel.ticks import tabulate
from lminf.surgery.lora import LoRA
from lminf.train import batches, compiled, planning
from tests.models import specs
from tests.train import making

# No number of stages divides its vocabulary, and it uses all that the loss has.
LLAMA = spec.llama(
    vocab_size=67, width=16, num_layers=8, num_heads=4, num_kv_heads=2, hidden_dim=32,
    trained_length=16, tied=False,
)  # fmt: skip
SHAPE = dataclasses.replace(LLAMA, final_soft_cap=3.0, embed_scale=2.0)
ROWS = 16
OBJECTIVE = (CrossEntropy(scale=0.5), ZLoss(1e-2))


@pytest.fixture(autouse=True)
def as_users_run_it():
    """optax mixes dtypes and ranks, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def program(text, **changes):
    options = {"shape": SHAPE, "objective": OBJECTIVE, **changes}
    return making.program(pipeline=pipeline.parse(text), **{"data": 1, **options})


def batch():
    """Two documents in each row, one of them of half the weight."""
    cut = making.LENGTH // 2
    positions = np.tile(np.arange(cut, dtype=np.int32), (ROWS, 2))
    weights = np.where(np.arange(2 * cut) < cut, 0.5, 1.0).astype(np.float32)
    return {
        **making.tokens(rows=ROWS),
        "positions": positions,
        "segments": np.repeat([[0, 1]], cut, axis=1).astype(np.int32).repeat(ROWS, axis=0),
        "weights": np.tile(weights, (ROWS, 1)),
    }


@functools.cache
def params():
    return making.host(specs.parameters(SHAPE))


def gradients(made):
    laid_out = jax.tree.map(jax.device_put, params(), made.shardings.params)
    reported, gradient = jax.jit(made.gradients)(laid_out, making.put(made, batch()))
    return float(reported["loss"]), gradient


@pytest.fixture(scope="module")
def alone():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return gradients(making.program(shape=SHAPE, objective=OBJECTIVE))


def passes_run(monkeypatch):
    """Passes that devices really run, (kind, microbatch) by (device, copy of the model)."""
    seen = defaultdict(list)

    def noted(method, kinds):
        def run(self, carry, i, *, of_input=True, **options):
            def note(stage, copy, i):
                seen[int(stage), int(copy)].append((kinds[0] if of_input else kinds[1], int(i)))

            jax.debug.callback(note, self.index, jax.lax.axis_index(("data", "fsdp")), i)
            options |= {} if len(kinds) == 1 else {"of_input": of_input}
            return method(self, carry, i, **options)

        return run

    methods = {"forward": "F", "backward": "BW", "softmax": "S", "head_gradient": "T"}
    for name, kinds in methods.items():
        monkeypatch.setattr(Device, name, noted(getattr(Device, name), kinds))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "text", "sizes"),
    [
        (2, "gpipe:vocab=two_barriers,microbatches=2", {"strategy": "zero3", "fsdp": 2}),
        (4, "zero_bubble:microbatches=4", {"data": 2}),
        (8, "1f1b:microbatches=8", {}),
        (2, "interleaved:vocab=two_barriers,microbatches=4", {"data": 2}),
        (4, "interleaved:microbatches=8", {}),
        (2, "v_half:vocab=two_barriers,microbatches=2", {"data": 2}),
        (4, "v_half:microbatches=8", {"strategy": "zero3", "fsdp": 2}),
    ],
)
def test_a_pipelined_gradient_follows_its_schedule_and_equals_that_of_a_single_device(
    stages, text, sizes, alone, monkeypatch
):
    made, seen = program(text, stage=stages, **sizes), passes_run(monkeypatch)
    loss, gradient = gradients(made)
    assert loss == pytest.approx(alone[0], abs=making.ATOL)
    assert making.largest_difference(gradient, alone[1]) < making.ATOL
    jax.effects_barrier()
    assert made.pipeline is not None
    schedule = made.pipeline.build(made.mesh)
    expected = [
        (each.device, each.kind, each.microbatch, each.chunk) for each in schedule.passes
    ]  # fmt: skip
    assert len(seen) == made.mesh.size
    for (device, _), found in seen.items():
        shown = [
            (device, kind, *(schedule.microbatch_and_chunk(i) if kind in "FBW" else (i, 0)))
            for kind, i in found
        ]
        assert shown == [each for each in expected if each[0] == device]


@pytest.mark.slow
def test_tensor_parallelism_beside_the_stages_changes_nothing(alone):
    text = "1f1b:vocab=two_barriers,microbatches=4"
    loss, gradient = gradients(program(text, stage=2, strategy="tensor", tensor=2, data=2))
    assert loss == pytest.approx(alone[0], abs=making.ATOL)
    assert making.largest_difference(gradient, alone[1]) < making.ATOL


@pytest.mark.slow
def test_the_vocabulary_takes_the_same_memory_of_every_device_as_the_stages_grow():
    """As the compiler laid it out: a row more on each device costs the same."""
    rows, costs = 512, []
    for stages in (2, 4):
        totals = []
        for each in (rows, 2 * rows):
            shape = dataclasses.replace(SHAPE, num_layers=4, windows=(None,) * 4,
                                        vocab_size=stages * each)  # fmt: skip
            made = program(f"1f1b:microbatches={stages}", shape=shape, stage=stages)
            state, inputs = compiled.shapes_of(made, 2 * stages, making.LENGTH)
            step = jax.jit(made.gradients, out_shardings=(None, made.gradient_shardings))
            totals.append(compiled.memory_of(step.lower(state.params, inputs).compile()).total)
        costs.append((totals[1] - totals[0]) / rows)
    assert costs[1] == pytest.approx(costs[0], rel=0.1)


@pytest.mark.parametrize("vocab_size", [64, 67])
def test_each_device_holds_its_share_of_the_vocabulary_and_of_the_layers(vocab_size):
    shape = dataclasses.replace(SHAPE, vocab_size=vocab_size)
    for stages in (2, 4, 8):
        made = program("1f1b", shape=shape, stage=stages)
        whole, laid_out = made.shapes, made.shardings
        for part in ("params", "optimizer"):
            held = partition.planned_bytes(getattr(whole, part), getattr(laid_out, part))
            total = sum(leaf.size * leaf.dtype.itemsize
                        for leaf in jax.tree.leaves(getattr(whole, part)))  # fmt: skip
            assert held == pytest.approx(total / stages, rel=0.01)


def test_buffers_hold_what_the_schedule_keeps_in_flight():
    eight = mesh.make(mesh.MeshShape(data=1, stage=8))

    def slots(text):
        return tabulate(pipeline.parse(text).build(eight))[1]

    assert slots("1f1b").inputs == 9
    assert slots("1f1b:vocab=two_barriers").inputs == 10
    assert slots("gpipe:microbatches=20").inputs == 20
    assert slots("1f1b").gradients <= 2
    assert slots("1f1b").softmax <= 3
    assert slots("interleaved").softmax <= 3
    plain = planning.activation_bytes(making.program(shape=SHAPE), rows=32, length=16)
    piped = planning.activation_bytes(program("1f1b", stage=8), rows=32, length=16)
    assert piped < plain / 8


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("1f1b", {"data": 8}, "a pipeline needs stages; set mesh.stage to 2 or more"),
        ("1f1b", {"stage": 8, "shape": making.SPEC}, "2 layers do not divide over mesh.stage=8"),
        ("1f1b:microbatches=3", {"stage": 4}, "1f1b over 4 stages needs at least 4 microbatches"),
        ("1f1b", {"stage": 2, "context": 2, "strategy": "context"}, "fsdp and tensor only"),
        ("1f1b", {"stage": 2, "grad_accum_steps": 2}, "cuts a batch into its microbatches"),
        ("1f1b", {"stage": 2, "lora": LoRA(rank=2)}, "adapters have no pipeline yet"),
        ("1f1b", {"stage": 2, "objective": (DPO(),)}, "cross-entropy of the tokens, .* not DPO"),
        ("1f2b", {}, "no pipeline is called '1f2b'; did you mean '1f1b'"),
        ("interleaved", {"stage": 8}, "8 layers do not divide over mesh.stage=8 with 2 chunks on"),
        ("v_half", {"stage": 8}, "8 layers do not divide over mesh.stage=8 with 2 chunks on"),
        ("1f1b:vocab=last_stage", {"stage": 2}, "without their share of the vocabulary's work"),
        ("1f1b:vocab=one", {"stage": 2}, "is called 'one'; use one_barrier, two_barriers$"),
        ("1f1b:microbatches=0", {"stage": 2}, "Pipeline.microbatches is 0; give a whole number"),
        ("1f1b:barriers=1", {"stage": 2}, "pipeline has no field 'barriers'"),
    ],
)
def test_what_a_pipeline_cannot_do_is_one_sentence(text, changes, message):
    with pytest.raises(InputError, match=message):
        program(text, **changes)


def test_stages_need_a_pipeline_and_rows_divide_into_its_microbatches():
    with pytest.raises(InputError, match="divides nothing over stage; give a pipeline"):
        making.program(stage=2, data=1)
    made = program("1f1b:microbatches=6", stage=2, data=4)
    with pytest.raises(InputError, match=r"16 rows does not divide into 6 x 4 .*microbatches"):
        batches.check(batch(), mesh=made.mesh, strategy=made.strategy, pieces=made.pieces)
