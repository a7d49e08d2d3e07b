"""Sweeps that fit a budget: shapes, sizes or rates x batches, tokens, seeds, and what to expect.

The largest model follows the published IsoFLOP law, N = 0.0834 FLOPs^0.5, because no other law
reaches down to models of seconds; the vocabularies and rates are a wide grid around the laws'
points, which at such sizes are off by factors. A law has exponents of N and of D, so a plan has
several of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
from lminf.scaling import accounting, baselines, published

SMALLEST = 2e9  # FLOPs of one run: below it a model has learned little more than frequencies
# What docs/studies measured on models of 1e5 parameters: standard deviation between seeds, and the
# curvature of a bowl, d2 loss / d(ln x)2. They make the expected interval, nothing else.
MEASURED = {"vocab": (0.03, 1.1), "step": (0.01, 0.5)}
STEPS = 256  # of a run at least: with fewer, a small model does not get below word frequencies
VOCAB_LENGTH, STEP_LENGTH = 128, 32  # tokens of a sequence
STEP_VOCAB = 512  # entries
SHARE = 0.8  # of the hours that training gets; the rest compiles and evaluates


@dataclass(frozen=True)
class Shape:
    """A Llama shape with heads of 64 channels, or one, and an MLP of 8/3 widths."""

    layers: int
    width: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.width // 64)

    @property
    def hidden(self) -> int:
        """Width of the MLP (channels)."""
        return round(8 * self.width / 3)

    @property
    def parameters(self) -> int:
        """N_nv."""
        return accounting.block_parameters(self.layers, self.width, self.hidden)


LADDER = tuple(
    Shape(max(2, width // 32), width)
    for width in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
)


def shape_for(flops: float) -> Shape:
    """The shape of a run of so many FLOPs: the one of the ladder next to the law's N."""
    law = published.ISOFLOP.constants
    ln_parameters = law["ln_k_nnv"] + law["alpha_nnv"] * math.log(flops)
    return min(LADDER, key=lambda shape: abs(math.log(shape.parameters) - ln_parameters))


@dataclass(frozen=True)
class Group:
    """Runs of one shape and length."""

    shape: Shape
    tokens: int
    flops: float  # of one run


@dataclass(frozen=True)
class Plan:
    """A sweep: groups of (shape, tokens), each with the same grid, and what it costs."""

    groups: tuple[Group, ...]  # the largest first
    sizes: tuple[int, ...]  # vocabularies; of a rate x batch study the one that it has
    rates: tuple[float, ...]
    batches: tuple[int, ...]  # sequences; of a vocabulary study the one that it has
    replicates: int = 1

    @property
    def flops(self) -> float:
        """FLOPs of all runs."""
        runs = len(self.sizes) * len(self.batches) * len(self.rates) * self.replicates
        return runs * sum(group.flops for group in self.groups)


def vocab(budget: float, *, text_tokens: float) -> Plan:
    """Vocabularies in factors of two at equal FLOPs, for three shapes of as many tokens each; the
    text has `text_tokens` bytes to be read once, the most that the smallest vocabulary can take.
    """
    sizes, rates = 4, 2
    shapes, flops = _shared(budget, sizes * rates, count=3, lengths=(1,))
    top = shapes[0]
    law = published.ISOFLOP.optimum(n_nv=top.parameters, d=top.width, flops=flops).vocab_size
    # Two factors of two below the law's size, and no vocabulary has less than its 256 bytes.
    lowest = max(8, round(math.log2(law)) - 2)
    chosen = tuple(2 ** (lowest + i) for i in range(sizes))
    per_token = accounting.training_flops(top.parameters, chosen[0] * top.width, 1)
    tokens = min(flops / per_token, text_tokens)
    groups = tuple(
        Group(shape, int(tokens), float(tokens * per_token * shape.parameters / top.parameters))
        for shape in shapes
    )
    peak = 6e-3 * math.sqrt(64 / top.width)
    fitting = 2.0 ** math.floor(math.log2(tokens / (VOCAB_LENGTH * STEPS)))
    batch = int(min(8, max(1, fitting)))
    return Plan(groups, chosen, (peak, 2 * peak), (batch,))


def step(budget: float, *, text_tokens: float, rates: int = 5, batches: int = 3) -> Plan:
    """Rates and batches in factors of two around the step law's point, for two shapes and three
    lengths of each."""
    lengths = (1, 0.5, 0.25)
    shapes, flops = _shared(budget, rates * batches, count=2, lengths=lengths)
    per_token = [
        float(accounting.training_flops(shape.parameters, STEP_VOCAB * shape.width, 1))
        for shape in shapes
    ]
    share = flops * sum(shape.parameters for shape in shapes) / shapes[0].parameters
    tokens = min(share / sum(per_token), text_tokens)
    point = baselines.rule("step").setting(
        baselines.Query(shapes[0].parameters, tokens, None, None)
    )
    assert point.batch is not None
    middle = max(2, round(math.log2(point.batch / STEP_LENGTH)))
    # Far below its range the law's rate and batch are several times too high (docs/studies): they
    # are the largest of the grid.
    lowest = max(0, middle - batches + 1)
    peak = 2.0 ** round(math.log2(point.lr))
    grid = tuple(peak * 2.0 ** (i - rates + 1) for i in range(rates))
    chosen = tuple(2 ** (lowest + i) for i in range(batches))
    # Whole steps of the largest batch: a group is of one D, whatever its batches.
    multiple = chosen[-1] * STEP_LENGTH
    counts = [max(1, int(tokens * part / multiple)) * multiple for part in lengths]
    groups = tuple(
        Group(shape, count, count * each)
        for shape, each in zip(shapes, per_token, strict=True)
        for count in counts
    )
    return Plan(groups, (STEP_VOCAB,), grid, chosen)


def _shared(
    budget: float, runs: int, *, count: int, lengths: Sequence[float]
) -> tuple[tuple[Shape, ...], float]:
    """(shapes, FLOPs of the longest run of the first): neighbours on the ladder, the largest next
    to the law's N, which share the budget by their N and the `lengths` of their runs."""
    flops = budget / runs
    shapes = LADDER[:count]
    for _ in range(3):  # the shares depend on the shapes, and the largest shape on its share
        top = max(count - 1, LADDER.index(shape_for(flops)))
        shapes = LADDER[top - count + 1 : top + 1][::-1]
        share = sum(lengths) * sum(shape.parameters for shape in shapes) / shapes[0].parameters
        flops = budget / runs / share
    least = flops * min(lengths) * shapes[-1].parameters / shapes[0].parameters
    if least < SMALLEST:
        raise InputError(
            f"{budget:.3g} FLOPs leave {least:.3g} for the smallest run, too few to train "
            f"anything; give at least {budget * SMALLEST / least:.3g} FLOPs, or more --hours"
        )
    return shapes, flops


def interval(kind: str, replicates: int) -> float:
    """Half the width of the optimum's 95 % interval, as a factor: 1.2 means within 20 %.

    Of the vertex of a parabola through three points in factors of two, whose losses have the
    noise of MEASURED over `replicates` seeds.
    """
    sigma, curvature = MEASURED[kind]
    error = math.sqrt(2) * sigma / math.sqrt(replicates) / (2 * curvature * math.log(2))
    return float(np.exp(1.96 * error))


def budgets(group: Group) -> Sequence[float]:
    """FLOPs at which the runs of a vocabulary study are read: the longest and three halvings."""
    return [group.flops / 2**i for i in (3, 2, 1, 0)]
