"""Training with further heads, which predict the tokens after the next one and are then dropped.

Head k reads the hidden state of token t, as the model's own head does, and predicts token
t + 1 + k. Sources: Gloeckle et al. 2024, arXiv:2404.19737, equation 2 (whose heads have a layer of
their own); heads that are tables alone and start as the model's own: Yamaguchi et al. 2024,
arXiv:2406.11477.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from lminf import ranges
from lminf.errors import InputError
from lminf.models import heads
from lminf.ranges import Range
from lminf.train.outer_layers import OuterLayers, mean_nll
from lminf.types import Params

MTP_HEADS = "mtp_heads"  # [heads, V, D] among what is trained


@dataclass(frozen=True)
class MultiToken:
    """The loss of OuterLayers, and added to it the mean nats of each further head's targets."""

    outer: OuterLayers
    mtp_heads: Annotated[int, Range(min=1, max=16)]

    def __post_init__(self):
        ranges.check(self)

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what is trained, with the further heads; what is frozen)."""
        trained, frozen = self.outer.split(params)
        head = jnp.asarray(heads.classifier(params))
        further = jnp.broadcast_to(head[None], (self.mtp_heads, *head.shape))
        return {**trained, MTP_HEADS: further}, frozen

    def join(self, trained: Params, frozen: Params) -> Params:
        """The model's parameters, without the further heads."""
        own = {name: x for name, x in trained.items() if name != MTP_HEADS}
        return self.outer.join(own, frozen)

    def __call__(
        self, params: Params, frozen: Params, batch: Mapping[str, Array]
    ) -> Float[Array, ""]:
        tokens, targets = batch["tokens"], batch["targets"]
        if tokens.shape[1] <= self.mtp_heads:
            raise InputError(
                f"rows of {tokens.shape[1]} tokens have none that lie {self.mtp_heads + 1} ahead; "
                f"give longer rows or fewer heads"
            )
        own = {name: x for name, x in params.items() if name != MTP_HEADS}
        hidden, model = self.outer.hidden(own, frozen, tokens), {**frozen, **own}
        loss = mean_nll(heads.lm(self.outer.spec, model, hidden), targets)
        for k in range(1, self.mtp_heads + 1):
            head = {**model, "head": params[MTP_HEADS][k - 1]}
            logits = heads.lm(self.outer.spec, head, hidden[:, :-k])
            loss = loss + mean_nll(logits, targets[:, k:])
        return loss
