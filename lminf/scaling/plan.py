"""Sweeps that fit a budget: shapes, sizes or rates x batches, tokens, seeds, and what to expect.

A run's model follows the published IsoFLOP law, N = 0.0834 FLOPs^0.5, because no other law reaches
down to models of seconds; the vocabularies and rates are a wide grid around the laws' points, which
at such sizes are off by factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lminf.errors import InputError
from lminf.scaling import accounting, published, rivals

SMALLEST = 2e9  # FLOPs of one run: below it a model has learned little more than frequencies
# What docs/studies measured on models of 1e5 parameters: standard deviation between seeds, and the
# curvature of a bowl, d2 loss / d(ln x)2. They make the expected interval, nothing else.
MEASURED = {"vocab": (0.03, 1.1), "step": (0.01, 0.5)}
SHARE = 0.8  # of the hours that training gets; the rest compiles and evaluates


@dataclass(frozen=True)
class Shape:
    """A Llama shape with heads of 16 channels at least and an MLP of 8/3 widths."""

    layers: int
    width: int

    @property
    def heads(self) -> int:
        return max(2, self.width // 64) if self.width >= 256 else self.width // 16

    @property
    def hidden(self) -> int:
        return round(8 * self.width / 3)

    @property
    def parameters(self) -> int:
        return accounting.block_parameters(self.layers, self.width, self.hidden)


LADDER = tuple(
    Shape(max(2, width // 32), width)
    for width in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
)


def shape_for(flops: float) -> Shape:
    """The shape of a run of so many FLOPs: the one of the ladder next to the law's N."""
    law = published.ISOFLOP.constants
    wanted = law["ln_k_nnv"] + law["alpha_nnv"] * math.log(flops)
    return min(LADDER, key=lambda shape: abs(math.log(shape.parameters) - wanted))


@dataclass(frozen=True)
class Plan:
    """A sweep: one model, a grid, and what it costs."""

    shape: Shape
    sizes: tuple[int, ...]  # vocabularies; of a rate x batch study the one that it has
    rates: tuple[float, ...]
    batches: tuple[int, ...]  # sequences; of a vocabulary study the one that it has
    replicates: int
    tokens: int  # of the longest run
    run_flops: float  # of one run at its full length

    @property
    def cells(self) -> int:
        return len(self.sizes) * len(self.batches)

    @property
    def flops(self) -> float:
        return self.cells * len(self.rates) * self.replicates * self.run_flops


def vocab(budget: float, *, text_tokens: float, sizes: int = 5, replicates: int = 2) -> Plan:
    """Vocabularies in factors of two at equal FLOPs; the text has `text_tokens` bytes to be read
    once, which is the most tokens that the smallest vocabulary can take.
    """
    rates = 3
    flops = _per_run(budget, sizes * rates * replicates)
    shape = shape_for(flops)
    law = published.ISOFLOP.optimum(n_nv=shape.parameters, d=shape.width, flops=flops).vocab_size
    # Two factors of two below the law's size, and no vocabulary has less than its 256 bytes.
    lowest = max(8, round(math.log2(law)) - sizes // 2)
    chosen = tuple(2 ** (lowest + i) for i in range(sizes))
    tokens = flops / accounting.training_flops(shape.parameters, chosen[0] * shape.width, 1)
    if tokens > text_tokens:
        flops *= text_tokens / tokens
        tokens = text_tokens
    peak = 6e-3 * math.sqrt(64 / shape.width)
    return Plan(shape, chosen, (peak / 2, peak, 2 * peak), (8,), replicates, int(tokens), flops)


def step(
    budget: float, *, text_tokens: float, vocab_size: int = 512, length: int = 64,
    rates: int = 7, batches: int = 5, replicates: int = 2,
) -> Plan:  # fmt: skip
    """Rates and batches in factors of two around the step law's point."""
    flops = _per_run(budget, rates * batches * replicates)
    shape = shape_for(flops)
    per_token = accounting.training_flops(shape.parameters, vocab_size * shape.width, 1)
    tokens = min(float(flops / per_token), text_tokens)
    point = rivals.rule("step").setting(rivals.Query(shape.parameters, tokens, None, None))
    assert point.batch is not None
    middle = max(2, round(math.log2(point.batch / length)))
    lowest = max(0, middle - batches // 2)
    # Far below its range the law's rate is several times too high: more of the grid lies below it.
    peak = 2.0 ** round(math.log2(point.lr))
    grid = tuple(peak * 2.0 ** (i - rates + 3) for i in range(rates))
    return Plan(
        shape, (vocab_size,), grid, tuple(2 ** (lowest + i) for i in range(batches)), replicates,
        int(tokens), float(tokens * per_token),
    )  # fmt: skip


def _per_run(budget: float, runs: int) -> float:
    if budget / runs < SMALLEST:
        raise InputError(
            f"{budget:.3g} FLOPs for {runs} runs are {budget / runs:.3g} each, too few to train "
            f"anything; give at least {runs * SMALLEST:.3g} FLOPs, or more --hours"
        )
    return budget / runs


def interval(kind: str, replicates: int, *, spacing: float = math.log(2)) -> float:
    """Half the width of the optimum's 95 % interval, as a factor: 1.2 means within 20 %.

    Of the vertex of a parabola through three points `spacing` apart in ln x, whose losses have the
    noise of MEASURED over `replicates` seeds.
    """
    sigma, curvature = MEASURED[kind]
    error = math.sqrt(2) * sigma / math.sqrt(replicates) / (2 * curvature * spacing)
    return float(np.exp(1.96 * error))


def budgets(plan: Plan) -> Sequence[float]:
    """FLOPs at which the runs of a vocabulary study are read: the longest and three halvings."""
    return [plan.run_flops / 2**i for i in (3, 2, 1, 0)]
