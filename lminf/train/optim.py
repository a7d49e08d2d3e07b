"""Optimisers, as values. Each builds optax's transformation for a learning rate of 1.

All are linear in the rate, so the step multiplies the update by what its schedule says for that
step: no schedule is hidden in a counter of the optimiser's state.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeAlias

import jax
import optax
from optax import contrib

from lminf import ranges
from lminf.models import decoder
from lminf.parallel import partition
from lminf.ranges import Range

Beta: TypeAlias = Annotated[float, Range(min=0, below=1)]  # of a running mean
# Multiplied by the rate; at 1 / rate a step would turn a weight into zero.
WeightDecay: TypeAlias = Annotated[float, Range(min=0)]


class Optimizer(Protocol):
    def build(self) -> optax.GradientTransformation:
        """Updates to be multiplied by the rate and added."""
        ...


def decayed(params: Any) -> Any:
    """Which parameters decay: matrices, but no norm and no bias."""

    def one(key_path, _):
        name = partition.path_of(key_path).rpartition("/")[2]
        # An adapter's a and b do not decay: towards zero is towards the model before it.
        return name in ("embed", "head") or name.startswith("w")

    return jax.tree_util.tree_map_with_path(one, params)


@dataclass(frozen=True)
class AdamW:
    """Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""

    b1: Beta = 0.9
    b2: Beta = 0.95
    epsilon: Annotated[float, Range(above=0)] = 1e-8
    weight_decay: WeightDecay = 0.1

    def __post_init__(self):
        ranges.check(self)

    def build(self) -> optax.GradientTransformation:
        return optax.adamw(
            1.0, self.b1, self.b2, self.epsilon, weight_decay=self.weight_decay, mask=decayed
        )


@dataclass(frozen=True)
class Lion:
    """Source: Chen et al. 2023, arXiv:2302.06675. Wants about a tenth of Adam's rate."""

    b1: Beta = 0.9
    b2: Beta = 0.99
    weight_decay: WeightDecay = 1.0

    def __post_init__(self):
        ranges.check(self)

    def build(self) -> optax.GradientTransformation:
        return optax.lion(1.0, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed)


@dataclass(frozen=True)
class Adafactor:
    """Second moments by row and column. Source: Shazeer and Stern 2018, arXiv:1804.04235.

    Updates are relative to each parameter's size, so its rate is near 1e-2.
    """

    decay_rate: Annotated[float, Range(above=0, below=1)] = 0.8
    weight_decay: WeightDecay = 0.0

    def __post_init__(self):
        ranges.check(self)

    def build(self) -> optax.GradientTransformation:
        return optax.adafactor(
            1.0,
            decay_rate=self.decay_rate,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=decayed,
        )


@dataclass(frozen=True)
class Muon:
    """Orthogonalised momentum for the matrices of layers, AdamW for the rest.

    Updates are scaled to Adam's size, so that one rate serves both.
    Source: Liu et al. 2025, arXiv:2502.16982.
    """

    momentum: Beta = 0.95
    weight_decay: WeightDecay = 0.1
    b1: Beta = 0.9
    b2: Beta = 0.95

    def __post_init__(self):
        ranges.check(self)

    def build(self) -> optax.GradientTransformation:
        return contrib.muon(
            1.0,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=0.2,  # the root mean square of AdamW's updates
            muon_weight_dimension_numbers=_matrices,
        )


def _matrices(params: Any) -> Any:
    """Of every matrix in the layers, which axes it sums over and which it gives."""

    def one(key_path, leaf):
        count = decoder.CONTRACTED_AXES.get(partition.path_of(key_path).rpartition("/")[2])
        if count is None:
            return None
        axes = tuple(range(1, leaf.ndim))  # axis 0 counts the layers, each a matrix of its own
        return contrib.MuonDimensionNumbers(axes[:count], axes[count:])

    return jax.tree_util.tree_map_with_path(one, params)


OPTIMIZERS = {"adamw": AdamW, "lion": Lion, "adafactor": Adafactor, "muon": Muon}
