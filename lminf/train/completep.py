"""CompleteP: transfers the learning rate of a small model to wider and deeper ones.

Every hidden matrix then changes what it computes by as much per step in a model of any width, and
every layer what the model computes by 1 / L of it, so that the rate, weight decay and epsilon that
are best for a base model stay the best. Source: Dey et al. 2025, arXiv:2505.01618, table 1, α = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import optax

from lminf import ranges
from lminf.errors import InputError
from lminf.models.spec import Layers, ModelSpec, Size
from lminf.parallel import partition
from lminf.train.optim import AdamW, Optimizer, decayed


@dataclass(frozen=True)
class CompleteP:
    """The base model, whose optimizer settings a wider or deeper one takes over. Its heads have the
    same size, and its MLP the same multiple of the width.
    """

    width: Size
    layers: Layers

    def __post_init__(self):
        ranges.check(self)

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """The model with the multipliers of its size: those of a Granite, as which it is exported.

        The table of embeddings is initialised with a deviation of width ** -0.5, where the source
        has one of no size, so its multipliers are the source's times (width / base) ** 0.5.
        """
        if spec.moe is not None or spec.family not in ("llama", "granite"):
            raise InputError(
                f"CompleteP is derived for dense Llama shapes, and this is "
                f"{'a mixture of experts' if spec.moe else spec.family}; leave completep out"
            )
        wider, deeper = self._ratios(spec)
        return replace(
            spec,
            family="granite",
            embed_scale=spec.embed_scale * wider**0.5,
            residual_scale=spec.residual_scale / deeper,
            logit_scale=spec.logit_scale * wider**-0.5,
        )

    def optimizer(self, optimizer: Optimizer, spec: ModelSpec) -> optax.GradientTransformation:
        """AdamW for a learning rate of 1, where the rate is that of the base model."""
        if not isinstance(optimizer, AdamW):
            raise InputError(
                f"CompleteP is derived for AdamW, not {type(optimizer).__name__}; choose "
                f"optimizer=adamw, or leave completep out"
            )
        wider, deeper = self._ratios(spec)
        # A gradient multiplied by c under epsilon is the gradient under epsilon / c.
        gradients = {"table": wider**0.5, "hidden": wider * deeper, "block": wider * deeper,
                     "other": wider}  # fmt: skip
        updates = {"table": wider**-0.5, "hidden": 1 / wider, "block": 1.0, "other": 1.0}
        return optax.chain(
            _multiply(gradients),
            optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.epsilon),
            _multiply(updates),
            # After the rates: a wider matrix decays as fast as the base model's.
            optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
            optax.scale(-1.0),
        )

    def _ratios(self, spec: ModelSpec) -> tuple[float, float]:
        return spec.width / self.width, spec.num_layers / self.layers


def _multiply(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies each leaf by the factor of its kind."""

    def one(path, leaf):
        return leaf * factors[_kind(partition.path_of(path))]

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def _kind(path: str) -> str:
    """What the table of the source calls a parameter: tables of tokens, hidden matrices, other
    parameters of the blocks, parameters outside them.
    """
    name = path.rpartition("/")[2]
    if name in ("embed", "head"):
        return "table"
    if name.startswith("w"):
        return "hidden"
    return "block" if path.startswith("layers/") else "other"
