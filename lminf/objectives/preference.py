"""Preferences between two answers to one prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lminf import ranges
from lminf.objectives.terms import token_weights
from lminf.ranges import Range

ANSWERS = ("chosen_", "rejected_")


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation. Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7.

    Row i of `chosen_…` and of `rejected_…` is a prompt with its better and its worse answer; the
    weights are 1 on the answer's targets and 0 elsewhere. Reported are the loss (nats per pair),
    the share of pairs whose better answer is preferred, and their mean margin (nats).
    """

    beta: Annotated[float, Range(above=0)] = 0.1
    scale: Annotated[float, Range(above=0)] = 1.0

    arrays = tuple(f"{a}{name}" for a in ANSWERS for name in ("tokens", "targets", "weights"))
    references = ("reference",)

    def __post_init__(self):
        ranges.check(self)

    def weight(self, batch: Mapping[str, Array]) -> Array:
        return jnp.float32(len(batch["chosen_tokens"]))

    def __call__(self, model, references):
        chosen, rejected = (
            self._log_ratio(model, references["reference"], prefix) for prefix in ANSWERS
        )
        margin = self.beta * (chosen - rejected)
        loss = -jax.nn.log_sigmoid(margin).sum()
        return loss, {
            "loss": loss,
            "preferred": (margin > 0).sum(dtype=jnp.float32),
            "margin": margin.sum(),
        }

    def _log_ratio(self, model, reference, prefix):
        """log π(answer) - log π_ref(answer) of every row, nats [B]."""
        weights = token_weights(model.batch, prefix)
        reference_nll = jax.lax.stop_gradient(reference.token_loss(prefix).nll)
        return (weights * (reference_nll - model.token_loss(prefix).nll)).sum(1)
