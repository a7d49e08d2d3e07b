"""Where arrays lie: tables, products of strategies, bytes on each device."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lminf.errors import InputError
from lminf.models import decoder, spec
from lminf.parallel import mesh, partition
from tests.train import making


def laid_out(strategy, **sizes):
    made = making.program(strategy=strategy, **sizes)
    return jax.tree.map(lambda sharding: sharding.spec, made.shardings.params)


def test_each_strategy_slices_what_it_says():
    whole = laid_out("zero1", fsdp=8)
    assert all(not any(found) for found in jax.tree.leaves(whole, is_leaf=lambda x: type(x) is P))
    sliced = laid_out("zero3", fsdp=4, data=2)
    assert sliced["layers"]["attention"]["wq"] == P(None, "fsdp", None, None)
    assert sliced["embed"] == P(None, "fsdp")
    both = laid_out("tensor+zero3", tensor=2, fsdp=2, data=2)
    assert both["layers"]["attention"]["wq"] == P(None, "fsdp", "tensor", None)
    assert both["layers"]["mlp"]["w_down"] == P(None, "tensor", "fsdp")
    assert both["embed"] == P("tensor", "fsdp")


def test_what_does_not_divide_is_sliced_along_another_axis_or_not_at_all():
    eight = mesh.make(mesh.MeshShape(fsdp=8, data=1))
    rules = partition.FSDP_RULES
    assert partition.spec(("layers", "embed", "mlp"), (2, 12, 32), rules, eight) == P(
        None, None, "fsdp"
    )
    assert partition.spec(("embed",), (12,), rules, eight) == P(None)


def test_a_parameter_that_matches_no_rule_or_two_is_an_error():
    table = dict(decoder.AXES)
    with pytest.raises(InputError, match="layers/attention/wz matches 0 of the rules"):
        partition.logical_axes("layers/attention/wz", table)
    table["layers/attention/w."] = ("layers", "embed", "heads", "head_dim")
    with pytest.raises(InputError, match="layers/attention/wq matches 2 of the rules"):
        partition.logical_axes("layers/attention/wq", table)


# Wide enough that what no stage slices (a step's counters) is nothing beside what it does.
WIDE = spec.llama(
    vocab_size=256, width=64, num_layers=2, num_heads=8, num_kv_heads=8, hidden_dim=192,
    trained_length=16,
)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "bytes_per_parameter"),
    [
        ("data", 16),
        ("zero1", 4 + 12 / 8),
        ("zero2", 2 + 14 / 8),
        ("zero3", 16 / 8),
    ],
)
def test_bytes_on_a_device_follow_zeros_formula(strategy, bytes_per_parameter):
    """2 for weights, 2 for gradients, 12 for masters and moments. Source: arXiv:1910.02054."""
    made = making.program(strategy=strategy, shape=WIDE, fsdp=8, dtype=jax.numpy.bfloat16)
    gradients = made.shapes.params, made.gradient_shardings
    held = [(made.shapes, made.shardings), gradients]
    arrays = jax.tree.map(
        lambda leaf, sharding: jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding),
        *(tuple(pair[part] for pair in held) for part in (0, 1)),
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.shapes.params))
    formula = bytes_per_parameter * parameters
    assert partition.device_bytes(arrays) == pytest.approx(formula, rel=0.02)
    planned = sum(partition.planned_bytes(*pair) for pair in held)
    assert partition.device_bytes(arrays) == planned


def test_a_mesh_takes_what_is_left_and_refuses_what_is_not_there():
    assert dict(mesh.make(mesh.MeshShape(tensor=2)).shape)["data"] == 4
    with pytest.raises(InputError, match="the mesh fsdp=16 needs 16 devices and there are 8"):
        mesh.make(mesh.MeshShape(data=1, fsdp=16))
    with pytest.raises(InputError, match="does not divide 8 devices"):
        mesh.make(mesh.MeshShape(tensor=3))
    with pytest.raises(ValueError, match="only one can take the rest"):
        mesh.MeshShape(data=-1, fsdp=-1)


def test_devices_that_would_all_do_the_same_are_refused():
    tensor = mesh.make(mesh.MeshShape(tensor=2))
    with pytest.raises(InputError, match=r"mesh.tensor=2 but .* add it, as in zero3\+tensor"):
        partition.check(partition.parse("zero3"), tensor)
    partition.check(partition.parse("zero3+tensor"), tensor)
    with pytest.raises(InputError, match="did you mean 'zero3'"):
        partition.parse("zero 3+tensor")
