"""How long a training step takes on devices that are not here: from shapes and data sheets.

    step = (products + collectives between them) (1 + bubble) + what others take beyond products

Products of matrices reach a given share of the peak, or wait for memory. Collectives over `tensor`,
`context` and `expert` stand between products that need them; those over `fsdp` and `data` and the
sends between stages run beside products, and only what they take longer counts. An all-gather or a
reduce-scatter of B bytes over n devices sends B (n - 1) / n from each, an all-reduce twice that.

Not in it: latencies, the optimizer's kernels, data loading, networks that others use, and any
kernel's own efficiency. It ranks layouts; a measured step replaces it.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import jax.numpy as jnp

from lminf.models import cost
from lminf.parallel.hardware import Kind
from lminf.train import planning
from lminf.train.layouts import Layout, Memory, ShardedBytes
from lminf.train.step import TrainStep

# Axes from the innermost, whose devices are next to each other, to the outermost.
INNERMOST = ("tensor", "context", "expert", "fsdp", "data", "stage")


@dataclass(frozen=True)
class Work:
    """What a step over rows x length tokens computes and sends, whatever its layout."""

    tokens: int
    length: int
    model_flops: float  # of a token, forward and backward
    head: float  # forward FLOPs of a token: of the head,
    layers: float  # of the products of layers,
    attention: float  # of scores and weighted values,
    unread: float  # and of experts whose outputs nothing reads
    num_layers: int
    mixed_layers: int  # of those, with experts
    stream_bytes: int  # of a token's hidden state
    kv_bytes: int  # of its keys and values in one layer
    expert_copies: int  # of a token's hidden state, that go to experts
    itemsize: int


def work_of(program: TrainStep, *, rows: int, length: int) -> Work:
    spec, itemsize = program.spec, jnp.dtype(program.dtype).itemsize
    head = 2 * spec.width * spec.vocab_size
    mixed, unread = 0, 0.0
    if spec.moe is not None:
        mixed = spec.num_layers - spec.moe.dense_layers
        each = 2 * (3 if spec.mlp.gated else 2) * spec.width * spec.moe.hidden_dim
        unread = mixed * each * max(0.0, spec.moe.computed_experts - spec.moe.top_k)
    return Work(
        tokens=rows * length,
        length=length,
        model_flops=planning.flops_per_token(program, length),
        head=head,
        layers=cost.matmul_flops_per_token(spec) - head,
        attention=cost.attention_flops(spec, program.policies, length) / length,
        unread=unread,
        num_layers=spec.num_layers,
        mixed_layers=mixed,
        stream_bytes=spec.width * itemsize,
        kv_bytes=2 * spec.num_kv_heads * spec.head_dim * itemsize,
        expert_copies=spec.moe.top_k if spec.moe else 0,
        itemsize=itemsize,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on; together the whole."""

    products: float  # of the model's own FLOPs
    recomputation: float  # of those that the backward repeats
    unread_experts: float  # of those whose outputs nothing reads: without a capacity all compute
    memory: float  # that reading weights and activations takes longer than multiplying
    tensor_collectives: float
    context_collectives: float
    expert_collectives: float
    exposed_collectives: float  # of fsdp, data and between stages
    imbalance: float  # waiting for the stage that has the head
    bubble: float

    @cached_property
    def total(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def bottleneck(self) -> str:
        """What takes longest beside the model's own products, and its share."""
        name = max(PARTS[1:], key=lambda part: getattr(self, part))
        share = getattr(self, name) / self.total
        return f"{name.replace('_', ' ')} {share:.0%}" if share >= 0.01 else "products"


PARTS = tuple(field.name for field in fields(StepTime))


def step_time(
    layout: Layout,
    sharded: ShardedBytes,
    work: Work,
    taken: Memory,
    kind: Kind,
    *,
    efficiency: float,
) -> StepTime:
    """The seconds of one step. `efficiency` is the share of the peak FLOPs that matrix products
    reach, `taken` the bytes that the layout takes.
    """
    reach = layout.devices * kind.peak_flops * efficiency
    products = work.model_flops * work.tokens / reach
    recomputation = recomputed_flops(layout.remat, work) * work.tokens / reach
    unread = passes_of(layout, backward=2) * work.unread * work.tokens / reach
    multiplying = products + recomputation + unread
    traffic = moved_bytes(layout, sharded, work, taken) / kind.memory_bandwidth
    computing = max(multiplying, traffic)
    took = {
        axis: sent / bandwidth(layout, axis, kind)
        for axis, sent in collectives(layout, sharded, work).items()
    }
    tensor, context, expert = (took.pop(axis) for axis in ("tensor", "context", "expert"))
    busy = computing + tensor + context + expert
    waiting = busy * (heaviest_stage(layout, work) - 1)
    return StepTime(
        products=products,
        recomputation=recomputation,
        unread_experts=unread,
        memory=computing - multiplying,
        tensor_collectives=tensor,
        context_collectives=context,
        expert_collectives=expert,
        exposed_collectives=max(0.0, sum(took.values()) - computing),
        imbalance=waiting,
        bubble=(busy + waiting) * layout.passes.bubble(layout.sizes.stage, layout.accumulation),
    )


def mfu(time: StepTime, layout: Layout, work: Work, kind: Kind) -> float:
    """Model FLOPs utilization: the model's own FLOPs as a share of the peak."""
    peak = layout.devices * kind.peak_flops
    return work.model_flops * work.tokens / (time.total * peak)


def recomputed_flops(remat: str, work: Work) -> float:
    """FLOPs of a token's forward pass that the backward pass computes again."""
    again = {"none": 0.0, "dots": work.attention, "full": work.layers + work.attention}
    return again[remat]


def local_tokens(layout: Layout, work: Work) -> float:
    """Tokens of a micro-batch on a device; devices of the `tensor` axis have the same ones."""
    return layout.micro_batch * work.length / layout.sizes.context


def passes_of(layout: Layout, *, backward: int = 1) -> int:
    """Times that a micro-batch goes through a layer: forward, backward (which counts so often, of
    FLOPs twice), and forward again.
    """
    return 1 + backward + (layout.remat == "full")


def moved_bytes(layout: Layout, sharded: ShardedBytes, work: Work, taken: Memory) -> float:
    """Read from and written to a device's memory in a step: weights in every pass of a micro-batch
    and their gradients, activations in and out of every pass, and the state in the update.
    """
    weights = sharded.weights / layout.sizes.stage * (passes_of(layout) + 1)
    channels = sum(sharded.channels[layout.remat]) * work.num_layers / layout.sizes.stage
    activations = 2 * passes_of(layout) * local_tokens(layout, work) * channels * work.itemsize
    state = taken.params + taken.grads + taken.optimizer
    return layout.accumulation * (weights + activations) + 2 * state


def collectives(layout: Layout, sharded: ShardedBytes, work: Work) -> dict[str, float]:
    """Bytes that each device sends in a step, by the axis over which it sends them."""
    sizes, count, passes = layout.sizes, layout.accumulation, passes_of(layout)
    tokens = local_tokens(layout, work)
    stream, layers = tokens * work.stream_bytes, work.num_layers / sizes.stage
    # Around attention and around the MLP an all-gather and a reduce-scatter.
    tensor = count * passes * layers * 4 * stream * ring_share(sizes.tensor)
    kv = tokens * work.kv_bytes / sizes.tensor
    context = count * (passes + 1) * layers * kv * (sizes.context - 1)  # once more: gradients
    mixed = work.mixed_layers / sizes.stage
    expert = count * passes * mixed * 2 * stream * work.expert_copies * ring_share(sizes.expert)
    weights = sharded.weights / sizes.stage
    gradient = weights * (4 / work.itemsize if count > 1 else 1)
    reduced = gradient / sizes.fsdp if sharded.shards_grads else gradient
    if sharded.shards_weights:  # gathered in both passes of a piece, and reduced after it
        fsdp = count * (2 * weights + gradient) * ring_share(sizes.fsdp)
    else:  # once a step: the gradient is reduced, and slices or new weights are gathered
        fsdp = (gradient + weights) * ring_share(sizes.fsdp)
    data = 2 * reduced * ring_share(sizes.data)
    ends = 2 * count * stream * layout.passes.chunks / sizes.tensor if sizes.stage > 1 else 0.0
    return {"tensor": tensor, "context": context, "expert": expert, "fsdp": fsdp, "data": data,
            "stage": ends}  # fmt: skip


def ring_share(devices: int) -> float:
    """The share of a collective's bytes that each device sends in a ring."""
    return (devices - 1) / devices


def bandwidth(layout: Layout, axis: str, kind: Kind) -> float:
    """Bytes per second of a device to its next one along an axis: within a domain if the axis and
    those inside of it fit into one.
    """
    inside = INNERMOST[: INNERMOST.index(axis) + 1]
    span = math.prod(getattr(layout.sizes, name) for name in inside)
    return kind.link_bandwidth if span <= kind.domain else kind.network_bandwidth


def heaviest_stage(layout: Layout, work: Work) -> float:
    """FLOPs of the last stage, which has the head, as a multiple of the mean stage's."""
    stages = layout.sizes.stage
    if stages == 1 or layout.passes.spreads_vocabulary:
        return 1.0
    layers = work.layers + work.attention
    return (layers / stages + work.head) / ((layers + work.head) / stages)
