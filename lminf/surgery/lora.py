"""Low-rank adapters: W + (alpha / rank) A B, where only A and B learn.

Dictionary in, dictionary out: `merge` gives parameters of the model's own form, so nothing else
knows of adapters, and a finished one is exported like any model.
Source: Hu et al. 2021, arXiv:2106.09685.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf import ranges
from lminf.errors import InputError
from lminf.models import decoder
from lminf.models.quantization import check_float
from lminf.ranges import Range
from lminf.types import Params


@dataclass(frozen=True)
class LoRA:
    """Adapters of every matrix of the layers whose name is among the targets."""

    rank: Annotated[int, Range(min=1)] = 16
    alpha: Annotated[float, Range(above=0)] = 32.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

    def __post_init__(self):
        ranges.check(self)
        if not self.targets or set(self.targets) - set(decoder.CONTRACTED_AXES):
            raise InputError(
                f"LoRA on {', '.join(self.targets) or 'nothing'}; give targets among "
                f"{', '.join(decoder.CONTRACTED_AXES)}"
            )

    def init(self, params: Params, *, key: jax.Array) -> dict[str, Any]:
        """Adapters that change nothing yet: A is drawn, B is zero."""
        check_float(params, purpose="LoRA")
        adapters = {}
        for group, matrices in params["layers"].items():
            for name, w in matrices.items():
                if name in self.targets:
                    key, leaf_key = jax.random.split(key)
                    adapters.setdefault(group, {})[name] = self._pair(
                        w.shape, decoder.CONTRACTED_AXES[name], leaf_key
                    )
        return {"layers": adapters}

    def _pair(self, shape, summed: int, key) -> dict[str, Array]:
        layers, inputs, outputs = shape[0], shape[1 : 1 + summed], shape[1 + summed :]
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        drawn = jax.random.normal(key, (layers, fan_in, self.rank), jnp.float32)
        return {"a": drawn * fan_in**-0.5, "b": jnp.zeros((layers, self.rank, fan_out))}

    def merge(self, params: Params, adapters: Mapping[str, Any]) -> Params:
        """The parameters of the adapted model, in the dtype of `params`."""
        check_float(params, purpose="LoRA")
        layers = dict(params["layers"])
        for group, matrices in adapters["layers"].items():
            layers[group] = {
                **layers[group],
                **{name: self._added(layers[group][name], pair) for name, pair in matrices.items()},
            }
        return {**params, "layers": layers}

    def _added(self, w: Float[Array, "L ..."], pair) -> Float[Array, "L ..."]:
        product = pair["a"].astype(w.dtype) @ pair["b"].astype(w.dtype)
        return w + jnp.asarray(self.alpha / self.rank, w.dtype) * product.reshape(w.shape)
