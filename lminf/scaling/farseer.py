"""Farseer: a loss whose exponent of D grows with N, in place of Chinchilla's two separate terms.

    L(N, D) = exp(a3 N^c3 + b3) + exp(a2 N^c2 + b2) D^-exp(a1 N^c1 + b1)

N non-embedding parameters, D tokens, raw; L in bits per character of the paper's text.
Source: Li et al. 2025, arXiv:2506.10972. PUBLISHED is from memory and was not confirmed: use the
form, and these numbers for the shape alone.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lminf.scaling import accounting


class Term(NamedTuple):
    """exp(a N^c + b)."""

    a: float
    c: float
    b: float

    def __call__(self, n: ArrayLike) -> Float[np.ndarray, "..."]:
        return np.exp(self.a * np.asarray(n, np.float64) ** self.c + self.b)


class Farseer(NamedTuple):
    floor: Term  # the loss with unlimited data
    scale: Term
    exponent: Term  # of D

    def loss(self, *, n: ArrayLike, d: ArrayLike) -> Float[np.ndarray, "..."]:
        """Bits per character of N parameters after D tokens."""
        return self.floor(n) + self.scale(n) * np.asarray(d, np.float64) ** -self.exponent(n)

    def optimum(self, *, flops: float) -> tuple[float, float]:
        """(N, D) of least loss at FLOPs = 6 N D, N between 1e7 and 1e12."""
        accounting.require_raw("flops", flops, "flops")
        n = np.geomspace(1e7, 1e12, 20_001)
        best = float(n[np.argmin(self.loss(n=n, d=flops / (6 * n)))])
        return best, flops / (6 * best)


PUBLISHED = Farseer(
    floor=Term(-0.021, 0.169, 0.091),
    scale=Term(88.01, -0.10, -6.287),
    exponent=Term(-0.124, 0.123, 0.424),
)
