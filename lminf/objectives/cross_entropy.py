"""Next-token losses from hidden states, without the [B, T, V] array of logits."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from lminf import kernels
from lminf.models import heads
from lminf.models.quantization import dequantize
from lminf.models.spec import ModelSpec
from lminf.types import Params


def token_nll(
    spec: ModelSpec,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    **options: Any,
) -> Float[Array, "B T"]:
    """-log p(target) of every position, nats, float32. `options` go to the kernel."""
    loss = kernels.linear_cross_entropy(
        heads.scaled(spec, hidden),
        dequantize(heads.classifier(params), hidden.dtype),
        targets,
        bias=params["head_bias"] if spec.head_bias else None,
        logits_soft_cap=spec.final_soft_cap,
        reduction="none",
        **options,
    )
    assert isinstance(loss, jax.Array)  # the log-sum-exp is not asked for
    return loss
