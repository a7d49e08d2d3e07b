"""The loss of hidden states that lie on a mesh: each device scores its own rows, against its own
slice of the vocabulary where the strategy slices it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from lminf import kernels
from lminf.models import heads
from lminf.models.quantization import dequantize
from lminf.models.spec import ModelSpec
from lminf.objectives.terms import TokenLoss
from lminf.parallel import partition
from lminf.parallel.partition import Strategy
from lminf.types import Params


def token_loss(
    spec: ModelSpec,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    mesh: Mesh,
    strategy: Strategy,
) -> TokenLoss:
    """-log p(target) everywhere; no [B, T, V] array on any device, forward or backward."""
    rules = strategy.activations
    hidden = heads.scaled(spec, hidden)
    rows = partition.spec(("batch", "length"), targets.shape, rules, mesh)
    classifier = dequantize(heads.classifier(params), hidden.dtype)
    bias = params["head_bias"].astype(jnp.float32) if spec.head_bias else None
    over = partition.spec(("vocab",), classifier.shape[:1], rules, mesh)[0]

    options = {
        "logits_soft_cap": spec.final_soft_cap,
        "reduction": "none",
        "return_lse": True,
        # Rare tokens learn from small gradients; skipping blocks of them is for fine-tuning.
        "filter_eps": None,
    }
    if over is not None:
        axes = [
            axis for part in rows for axis in ((part,) if isinstance(part, str) else part or ())
        ]
        return TokenLoss(
            *kernels.sharded_linear_cross_entropy(
                hidden, classifier, targets, bias=bias, mesh=mesh, vocab_axis=over,
                token_axes=axes, **options,
            )
        )  # fmt: skip

    def local(hidden, targets, classifier, bias):
        losses = kernels.linear_cross_entropy(hidden, classifier, targets, bias=bias, **options)
        return tuple(losses)  # the loss and the LSE

    losses = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, PartitionSpec(), PartitionSpec()),
        out_specs=(rows, rows),
        check_vma=False,  # the kernel's loops start from constants, which it would refuse
    )(hidden, targets, classifier, bias)
    return TokenLoss(*losses)
