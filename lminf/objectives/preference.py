"""Preferences between two answers: to one prompt, or to a long prompt and a short one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf import ranges
from lminf.objectives.terms import CrossEntropy, Model, Term, token_weights
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

    reference_prefix: ClassVar[str] = ""  # of the sequences that the reference reads
    references = ("reference",)

    def __post_init__(self):
        ranges.check(self)

    @property
    def arrays(self) -> tuple[str, ...]:
        prefixes = dict.fromkeys(("", self.reference_prefix))
        return tuple(
            f"{prefix}{answer}{name}"
            for prefix in prefixes
            for answer in ANSWERS
            for name in ("tokens", "targets", "weights")
        )

    def weight(self, batch: Mapping[str, Array]) -> Array:
        return jnp.float32(len(batch["chosen_tokens"]))

    def __call__(self, model, references):
        chosen, rejected = (
            self._log_ratio(model, references["reference"], answer) for answer in ANSWERS
        )
        margin = self.beta * (chosen - rejected)
        loss = -jax.nn.log_sigmoid(margin).sum()
        return loss, {
            "loss": loss,
            "preferred": (margin > 0).sum(dtype=jnp.float32),
            "margin": margin.sum(),
        }

    def _log_ratio(self, model, reference, answer):
        """log π(answer) - log π_ref(answer) of every row, nats [B]."""
        policy_log_prob = _log_prob(model, answer)
        return policy_log_prob - jax.lax.stop_gradient(
            _log_prob(reference, self.reference_prefix + answer)
        )


@dataclass(frozen=True)
class ShortToLong(DPO):
    """DPO whose reference reads a prompt of its own: the short one, on which it is good.

        r(y) = log π(y | x_L) - log π_ref(y | x_S)
        loss = -log σ(β r(chosen) - β r(rejected))

    The rows of `reference_chosen_…` and `reference_rejected_…` are the same answers after the short
    prompt; where they are those of `chosen_…` and `rejected_…`, this is DPO.
    Source: Chen et al. 2025, LongPO, arXiv:2502.13922.
    """

    reference_prefix: ClassVar[str] = "reference_"


def longpo(*, beta: float = 0.1, scale: float = 0.01) -> tuple[Term, ...]:
    """The terms of LongPO: nats per token of the better answer after the long prompt, which is what
    is reported as the loss, and `scale` times the short-to-long preference.
    """
    return ShortToLong(beta, scale), CrossEntropy(prefix="chosen_")


def _log_prob(model: Model, prefix: str) -> Float[Array, " B"]:
    """Of the answer in every row, nats."""
    return -(token_weights(model.batch, prefix) * model.token_loss(prefix).nll).sum(1)
