"""Distances of a model's next-token distributions from those of a frozen one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lminf import ranges
from lminf.models import heads
from lminf.objectives.terms import Batch, CrossEntropy, Model, Term, token_weights
from lminf.ranges import Range


@dataclass(frozen=True)
class ShortToLongKL:
    """Keeps a model's predictions of an answer after a long prompt near a reference's after the
    short prompt.

        KL(y) = Σ over tokens t of the answer  Σ_v π(v | x_L, y_<t) log π(v | x_L, y_<t)
                                                                      / π_ref(v | x_S, y_<t)

    Row i of `{prefix}…` and of `reference_{prefix}…` is the same answer after the two prompts; its
    targets have weights above 0 and nothing else has. Reported as `kl`, nats per token of answers.
    The distributions are formed at as many positions as the shorter rows have. Source: the
    constraint from which Chen et al. 2025, LongPO, arXiv:2502.13922, derive their objective.
    """

    scale: Annotated[float, Range(above=0)] = 1.0
    prefix: str = "chosen_"

    references = ("reference",)

    def __post_init__(self):
        ranges.check(self)

    @property
    def arrays(self) -> tuple[str, ...]:
        return tuple(
            f"{side}{self.prefix}{name}"
            for side in ("", "reference_")
            for name in ("tokens", "targets", "weights")
        )

    def weight(self, batch: Batch) -> Float[Array, ""]:
        return jnp.maximum((token_weights(batch, self.prefix) > 0).sum(dtype=jnp.float32), 1)

    def __call__(self, model: Model, references: Mapping[str, Model]):
        prefixes = self.prefix, f"reference_{self.prefix}"
        count = min(model.batch[f"{prefix}tokens"].shape[1] for prefix in prefixes)
        log_p, is_answer = _of_answer(model, prefixes[0], count)
        log_q, _ = _of_answer(references["reference"], prefixes[1], count)
        kl = (jnp.exp(log_p) * (log_p - jax.lax.stop_gradient(log_q))).sum(-1)
        total = jnp.where(is_answer, kl, 0.0).sum()
        return total, {"kl": total}


def sft_with_kl(*, scale: float = 0.01) -> tuple[Term, ...]:
    """Fine-tuning on the better answers after the long prompt, nats per token, which is what is
    reported as the loss, and `scale` times their distance from the reference: LongPO's ablation
    without a worse answer.
    """
    return ShortToLongKL(scale), CrossEntropy(prefix="chosen_")


def _of_answer(
    model: Model, prefix: str, count: int
) -> tuple[Float[Array, "B C V"], Bool[Array, "B C"]]:
    """Log-probabilities where an answer's tokens are predicted, in their order; behind them others,
    and which are of the answer.
    """
    is_answer = token_weights(model.batch, prefix) > 0
    order = jnp.argsort(~is_answer, axis=1, stable=True)[:, :count]
    hidden = jnp.take_along_axis(model.hidden(prefix), order[..., None], 1)
    log_probs = jax.nn.log_softmax(heads.lm(model.spec, model.params, hidden), -1)
    return log_probs, jnp.take_along_axis(is_answer, order, 1)
