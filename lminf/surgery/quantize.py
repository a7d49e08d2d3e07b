"""A model with its matrices in int8: parameters in, parameters out.

Quantised are the projections of attention, MLPs and experts, the embedding and the head. Routers,
norms, biases, learnt positions and sinks are a thousandth of a model and stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lminf.errors import InputError
from lminf.models import decoder, quantization
from lminf.types import Params

# One matrix at a time, so that its float32 copy is the only one.
_quantize = jax.jit(quantization.quantize, static_argnames="contracted")


def quantize(params: Params) -> Params:
    """The same model with int8 matrices; refused where they are int8 already."""
    if quantization.is_quantized(params):
        raise InputError("these weights are int8 already; quantise floating-point weights, once")
    return {name: _changed(name, part) for name, part in params.items()}


def _changed(name: str, part: Any) -> Any:
    if name in ("embed", "head"):
        return _quantize(part, contracted=(1,))
    if not name.endswith("layers"):
        return part
    return {group: _layer_group(group, matrices) for group, matrices in part.items()}


def _layer_group(group: str, matrices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _matrix(group, name, w) for name, w in matrices.items()}


def _matrix(group: str, name: str, w: Any) -> Any:
    """Layers are stacked on axis 0, experts on axis 1."""
    contracted: tuple[int, ...] | None = None
    if group == "moe" and name in ("gate", "up", "down"):
        contracted = (2,)
    elif name in decoder.CONTRACTED_AXES:
        contracted = tuple(range(1, 1 + decoder.CONTRACTED_AXES[name]))
    return w if contracted is None else _quantize(w, contracted=contracted)
