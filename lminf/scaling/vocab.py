"""The question all three vocabulary laws answer: which V at which budget, and how sure.

N_nv and N_v in raw parameters, D in raw tokens, F in raw FLOPs = 6 (N_nv + N_v) D.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Required, TypedDict, Unpack

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import accounting
from lminf.scaling import fertility as fertilities
from lminf.scaling.fertility import Fertility
from lminf.scaling.laws import Interval, Law

Draws = Float[np.ndarray, " draws"]
Constants = Mapping[str, Draws]
# Entries between which every law looks for its optimum: bytes, and four times the largest of public
# models. A law whose loss is least at an end has no optimum.
SMALLEST_VOCAB, LARGEST_VOCAB = 256.0, 1e6


class Query(TypedDict, total=False):
    """One model and its budget."""

    n_nv: Required[float]
    d: float | None  # width; None: the published ladder's
    flops: float | None  # None: compute-optimal
    tokens: float | None  # training tokens at the optimum, instead of FLOPs


@dataclass(frozen=True)
class Optimum:
    """The loss-optimal vocabulary of one query."""

    vocab_size: float
    n_v: float
    n_nv: float
    width: float
    flops: float
    tokens: float
    characters: float
    head_share: float  # of the training FLOPs: N_v / (N_nv + N_v)
    warnings: tuple[str, ...]

    def rounded(self, multiple: int) -> int:
        """V rounded up to a multiple (entries)."""
        return int(-(-self.vocab_size // multiple) * multiple)


@dataclass(frozen=True, kw_only=True)
class VocabLaw(Law):
    """Common to the three approaches; each says how N_v follows from its constants."""

    ignores_budget: ClassVar[bool] = False

    def n_v(self, constants: Constants, *, n_nv: float, width: float, flops: Draws) -> Draws:
        """Optimal N_v for each draw of the constants; -inf or inf where there is none: the loss is
        least at the smallest or largest vocabulary."""
        raise NotImplementedError

    @property
    def fertility(self) -> Fertility:
        """Tokens per character that the law was fitted with."""
        return fertilities.from_json(self.procedure["fertility"])

    def _solve(
        self, constants: Constants, *, n_nv, d=None, flops=None, tokens=None
    ) -> tuple[float, Draws, Draws]:
        """(width, N_v, FLOPs) of a query, the latter two for each draw; a token budget is met at
        the optimum by iteration."""
        if flops is not None and tokens is not None:
            raise InputError("flops and tokens were both given; a budget is one of them")
        accounting.require_raw("n_nv", n_nv, "n_nv")
        width = float(accounting.ladder_width(n_nv)) if d is None else float(d)
        accounting.require_raw("d", width, "width")
        shape = np.shape(constants["ln_k_nnv"])
        if tokens is None:
            if flops is not None:
                budget = np.full(shape, accounting.require_raw("flops", flops, "flops"))
            else:  # compute-optimal: the envelope's (N_nv / k)^(1 / alpha)
                budget = np.exp((np.log(n_nv) - constants["ln_k_nnv"]) / constants["alpha_nnv"])
            return width, self.n_v(constants, n_nv=n_nv, width=width, flops=budget), budget
        accounting.require_raw("tokens", tokens, "tokens")
        budget = n_v = np.full(shape, 6 * 1.05 * n_nv * tokens)
        for _ in range(30):  # N_v ~ F^0.4 and N_v < N_nv: contracts by 5 or more each time
            n_v = self.n_v(constants, n_nv=n_nv, width=width, flops=budget)
            new = 6 * (n_nv + n_v) * tokens
            finite = np.isfinite(n_v)
            if np.max(np.abs(new / budget - 1)[finite], initial=0) < 1e-7:
                break
            budget = np.where(finite, new, budget)
        return width, n_v, budget

    def optimum(self, **query: Unpack[Query]) -> Optimum:
        """Optimal vocabulary; InputError where the loss has no minimum over the searched sizes."""
        constants = {name: np.array([value]) for name, value in self.constants.items()}
        width, *solution = self._solve(constants, **query)
        n_nv = query["n_nv"]
        n_v, budget = (float(draws[0]) for draws in solution)
        if not np.isfinite(n_v):
            raise InputError(
                f"{self.version}: no loss-optimal vocabulary exists between {SMALLEST_VOCAB:g} and "
                f"{LARGEST_VOCAB:g} at N_nv={n_nv:g}, F={budget:.3g}; use another approach"
                + "".join(f" ({note})" for note in self.warnings)
            )
        vocab = n_v / width
        trained = budget / (6 * (n_nv + n_v))
        notes = [*self.warnings, *self.outside({"n_nv": n_nv, "flops": budget, "vocab": vocab})]
        has_budget = any(query.get(name) is not None for name in ("flops", "tokens"))
        if self.ignores_budget and has_budget:
            notes.append(
                f"approach {self.procedure['approach']} knows no budget: its V is the "
                "compute-optimal one for any"
            )
        per_character = float(self.fertility.tokens_per_character(vocab))
        return Optimum(
            vocab, n_v, float(n_nv), width, budget, trained, trained / per_character,
            n_v / (n_nv + n_v), tuple(notes),
        )  # fmt: skip

    def interval(self, **query: Unpack[Query]) -> Interval:
        """95 % interval of the optimal V (entries) over the law's draws; an end is infinite where
        more draws than it leaves out have no optimum, and `method` counts them."""
        width, n_v, _ = self._solve(self.constant_draws(), **query)
        return self.percentiles(n_v / width)._replace(method=self.resampling + without(n_v))


def without(optima: Draws) -> str:
    """How many of the draws have no optimum and why, as the end of a sentence; "" where all do."""
    ends = ((-np.inf, "smallest", SMALLEST_VOCAB), (np.inf, "largest", LARGEST_VOCAB))
    reasons = [
        f"in {count} the loss still falls at the {which} vocabulary searched ({bound:,.0f})"
        for end, which, bound in ends
        if (count := int(np.sum(optima == end)))
    ]
    if not reasons:
        return ""
    count = int(np.sum(np.isinf(optima)))
    return f"; {count} of {np.size(optima)} draws have no optimum: {' and '.join(reasons)}"
