"""Bytes and FLOPs of a training step on each device, from shapes alone: nothing is compiled."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lminf.models import cost, decoder
from lminf.models.spec import ModelSpec
from lminf.parallel import partition
from lminf.train.step import TrainStep

TABLES = ("embed", "head")  # of the vocabulary


@dataclass(frozen=True)
class Bytes:
    """On one device."""

    params: int  # what the forward pass reads
    grads: int
    optimizer: int  # with the float32 master parameters
    activations: int  # that the backward finds in memory: a formula, within what XLA makes of it
    transient: int  # `transient_bytes`

    @property
    def total(self) -> int:
        return self.params + self.grads + self.optimizer + self.activations + self.transient


def device_bytes(program: TrainStep, *, rows: int, length: int) -> Bytes:
    """What one device holds in a step over `rows` x `length` tokens."""
    state, laid_out = program.shapes, program.shardings
    gradient = state.params
    if program.pieces > 1:  # they are added in float32
        gradient = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), gradient)
    return Bytes(
        partition.planned_bytes((state.params, state.frozen), (laid_out.params, laid_out.frozen)),
        partition.planned_bytes(gradient, program.gradient_shardings),
        partition.planned_bytes(
            (state.master_params, state.optimizer), (laid_out.master_params, laid_out.optimizer)
        ),
        activation_bytes(program, rows=rows, length=length),
        math.ceil(_transient_bytes_of(program)),
    )


def transient_bytes(
    layers: float,
    tables: float,
    *,
    layer_slices: float,
    num_layers: float,
    shards_weights: bool,
    shards_grads: bool,
    pieces: int,
    piped: bool,
    itemsize: int,
) -> float:
    """Bytes of weights that fsdp's slices are gathered to, and of gradients that are not yet added
    to those of other pieces, or not yet in slices.

    `layers` and `tables` (embedding and head) are the weights that a device multiplies by, not in
    slices of fsdp; `layer_slices` the gradient of the layers as it is kept, in the dtype of the
    computation. Layers are gathered one at a time, the next beside the one at work; the tables
    whole, and so is their gradient. A pipeline gathers its stage for the step and sums its whole
    gradient in float32.
    """
    gathered = (tables + (layers if piped else 2 * layers / num_layers)) * shards_weights
    unsliced = ((layers + tables) * 4 / itemsize if piped else tables) * shards_grads
    of_piece = (tables + layer_slices) * (pieces > 1)
    return gathered + unsliced + of_piece


def _transient_bytes_of(program: TrainStep) -> float:
    """`transient_bytes` of a step. Gradients of adapters are small."""
    adapters, strategy = program.lora is not None, program.strategy
    params = program.shapes.frozen if adapters else program.shapes.params
    assert params is not None
    unsliced = tuple(rule for rule in strategy.params if rule[1] != "fsdp")
    tables, layers = (
        {name: x for name, x in params.items() if (name in TABLES) == of_tables}
        for of_tables in (True, False)
    )

    def bytes_by(rules, part):
        laid_out = partition.shardings(part, decoder.AXES, rules, program.mesh)
        return float(partition.planned_bytes(part, laid_out))

    sliced = program.mesh.shape["fsdp"] > 1
    return transient_bytes(
        bytes_by(unsliced, layers), bytes_by(unsliced, tables),
        layer_slices=bytes_by(strategy.grads, layers),
        num_layers=program.spec.num_layers / program.mesh.shape["stage"],
        shards_weights=sliced and shards_fsdp(strategy.params),
        shards_grads=sliced and shards_fsdp(strategy.grads) and not adapters,
        pieces=1 if adapters else program.pieces, piped=program.pipeline is not None,
        itemsize=jnp.dtype(program.dtype).itemsize,
    )  # fmt: skip


def shards_fsdp(rules: partition.Rules) -> bool:
    return any(axis == "fsdp" for _, axis in rules)


def activation_bytes(program: TrainStep, *, rows: int, length: int) -> int:
    """Kept for the backward, and the largest layer's own work while it is computed again."""
    kept, working = activation_channels(program)
    tokens = local_tokens(program, rows=rows, length=length)
    per_token = program.spec.num_layers / program.mesh.shape["stage"] * kept + working
    if program.pipeline is not None:
        per_token += program.pipeline.buffered_microbatches(program.mesh) * program.spec.width
    return math.ceil(tokens * per_token * jnp.dtype(program.dtype).itemsize)


def local_tokens(program: TrainStep, *, rows: int, length: int) -> float:
    """Tokens of one piece of a batch that a device works on; with `tensor`, others too."""
    sizes = program.mesh.shape
    over = {axis for logical, axis in program.strategy.activations if logical == "batch"}
    tokens = rows * length / (math.prod(sizes[axis] for axis in over) * program.pieces)
    in_context = any(axis == "context" for _, axis in program.strategy.activations)
    return tokens / (sizes["context"] if in_context else 1)


def activation_channels(program: TrainStep) -> tuple[float, float]:
    """Channels of a token on a device: those that each layer keeps for its backward, and those that
    the layer at work has besides.
    """
    s, sizes = program.spec, program.mesh.shape
    in_slices = any(axis == "tensor" for _, axis in program.strategy.activations)
    slices = sizes["tensor"] if in_slices else 1
    heads, wide = s.num_heads * s.head_dim, hidden_width(s)
    stream = s.width / slices  # between products, in slices of positions
    products = (heads + 2 * s.num_kv_heads * s.head_dim + wide * (1 + s.mlp.gated)) / slices
    products += 2 * s.width / slices
    everything = products + 2 * s.width + (3 * heads + 2 * wide) / slices
    kept = {"full": stream, "dots": stream + products, "none": stream + everything}
    return kept[program.remat], everything if program.remat != "none" else 0.0


def hidden_width(spec: ModelSpec) -> float:
    """Channels between the matrices of an MLP, or of all expert slots per token."""
    if spec.moe is None:
        return spec.mlp.hidden_dim
    return spec.moe.computed_experts * spec.moe.hidden_dim + spec.moe.shared_dim


def flops_per_token(program: TrainStep, length: int) -> float:
    """Of forward and backward, which is twice forward. What remat computes again does not count."""
    attention = cost.attention_flops(program.spec, program.policies, length)
    return 3 * (cost.matmul_flops_per_token(program.spec) + attention / length)


def table(program: TrainStep) -> list[dict[str, Any]]:
    """Every parameter: its shape, its logical axes, where its slices lie, and bytes on a device."""
    rows = []
    part = "params" if program.lora is None else "frozen"
    leaves = jax.tree_util.tree_leaves_with_path(getattr(program.shapes, part))
    for (key_path, leaf), sharding in zip(
        leaves, jax.tree.leaves(getattr(program.shardings, part)), strict=True
    ):
        path = partition.path_of(key_path)
        opt = partition.spec(
            partition.logical_axes(path, decoder.AXES), leaf.shape, program.strategy.opt,
            program.mesh,
        )  # fmt: skip
        rows.append(
            {
                "parameter": path,
                "shape": " x ".join(str(size) for size in leaf.shape),
                "weights": spell(sharding.spec),
                "optimizer": spell(opt),
                "bytes": partition.planned_bytes(leaf, sharding),
            }
        )
    return rows


def spell(spec: PartitionSpec) -> str:
    """`- fsdp tensor`: the mesh axes of each dimension."""
    names = ("-" if part is None else part if isinstance(part, str) else "*".join(part)
             for part in spec)  # fmt: skip
    return " ".join(names)
