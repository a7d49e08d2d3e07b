"""Approach 2: the vocabulary at which FLOPs stop falling, for a fixed text.

A larger V shortens the text and lengthens the head. At fixed characters H the FLOPs are
6 (N_nv + V d) H f(V); their minimum over V gives one root for each N_nv, and only the exponent
gamma of these roots is used, anchored at the best vocabulary of one small family.
Source: arXiv:2407.13623, section 4.2.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import optimize

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import accounting, laws, resample, surfaces, vocab, vocab_isoflop
from lminf.scaling.fertility import Fertility
from lminf.scaling.resample import Resampling
from lminf.scaling.tables import VocabTable, require_spread
from lminf.scaling.vocab import Constants, Draws

PUBLISHED_SIZES = (33e6, 85e6, 151e6, 302e6, 631e6, 1130e6, 2870e6)  # N_nv, parameters
ANCHOR_FLOPS = 2.7e17
SPREAD = (
    "a spread over budgets of the anchor within 12 % and lists of sizes without one, which is no "
    "sampling distribution"
)
ANCHOR_RANGE = 0.12  # the best size goes from 4096 to 10240 within +-12 % of the anchor budget


def flops_root(
    n_nv: ArrayLike, *, width: ArrayLike, fertility: Fertility
) -> Float[np.ndarray, " sizes"]:
    """V that minimises FLOPs at fixed text, in the searched range; NaN: no root."""

    def slope(log_v: float, n_nv: float, width: float) -> float:
        """d/dV of (N_nv + V d) f(V): negative below the optimum, positive above."""
        size = np.exp(log_v)
        per_character = fertility.tokens_per_character(size)
        return float((n_nv + size * width) * fertility.slope(size) + per_character * width)

    low, cap = vocab.SMALLEST_VOCAB, min(fertility.cap, vocab.LARGEST_VOCAB)
    if fertility.kind == "table":
        low, cap = fertility.fitted_range
    ends = (np.log(low), np.log(cap) - 1e-12)  # at the cap itself f is constant: no root
    roots = [
        optimize.root_scalar(slope, bracket=ends, args=pair, xtol=1e-13).root
        if slope(ends[0], *pair) < 0 < slope(ends[1], *pair)
        else np.nan
        for pair in np.broadcast(np.atleast_1d(n_nv), width)
    ]
    return np.exp(roots)


def fit_gamma(n_nv: Float[np.ndarray, " sizes"], n_v: Float[np.ndarray, " sizes"]) -> float:
    """gamma of ln(N_v,i / N_v,0) = gamma ln(N_nv,i / N_nv,0), i > 0, by Huber(1e-3)."""
    x, y = np.log(n_nv[1:] / n_nv[0]), np.log(n_v[1:] / n_v[0])

    def slope(gamma: float) -> float:  # of a convex objective, so it only rises
        return float(np.sum(x * np.clip(gamma * x - y, -1e-3, 1e-3)))

    return float(optimize.root_scalar(slope, bracket=(-5.0, 5.0), xtol=1e-14).root)


def best_anchor(table: VocabTable, flops: float) -> tuple[float, float]:
    """(V, N_v) with the lowest loss of the smallest family at a budget.

    Each run's loss is a quadratic spline in linear FLOPs, continued past its end: the small
    vocabularies end before the published anchor.
    """
    best = (np.inf, np.nan, np.nan)
    for run in table.runs_of(table.n_nv.min()):
        if np.unique(run.flops).size < 3:
            continue
        loss = float(surfaces.quadratic_spline(run.flops, run.loss, np.array([flops]))[0])
        best = min(best, (loss, float(run.vocab_size[0]), float(run.n_v[0])))
    if not np.isfinite(best[1]):
        raise InputError(
            "the smallest family has no run of three checkpoints, so there is no anchor for "
            "approach 2; give N_v of a known optimum or add checkpoints"
        )
    return best[1], best[2]


@dataclass(frozen=True, kw_only=True)
class DerivativeLaw(vocab.VocabLaw):
    """N_v = N_v0 (N_nv / N_nv0)^gamma. It knows no budget: always the compute-optimal one."""

    kind = "vocab-derivative"
    ignores_budget = True

    def n_v(self, constants: Constants, *, n_nv: float, width: float, flops: Draws) -> Draws:
        growth = constants["gamma"] * (np.log(n_nv) - constants["ln_n_nv0"])
        return np.exp(constants["ln_n_v0"] + growth) * np.ones_like(flops)


@dataclass(frozen=True)
class DerivativeFit:
    """Procedure of approach 2: roots at `sizes` with the ladder's width, anchored on the table."""

    sizes: tuple[Annotated[float, Range(above=0)], ...] = PUBLISHED_SIZES
    anchor_flops: Annotated[float, Range(above=0)] = ANCHOR_FLOPS

    def __post_init__(self):
        ranges.check(self)

    def roots(self, fertility: Fertility) -> Float[np.ndarray, " sizes"]:
        """V (entries) of least FLOPs for each of the sizes."""
        return flops_root(
            self.sizes, width=accounting.ladder_width(self.sizes), fertility=fertility
        )

    def gamma(self, fertility: Fertility, leave_out: int | None = None) -> float:
        """Exponent of the roots, of all sizes or without one of them."""
        keep = [i for i in range(len(self.sizes)) if i != leave_out]
        sizes = np.asarray(self.sizes)[keep]
        roots = self.roots(fertility)[keep]
        if not np.all(np.isfinite(roots)):
            raise InputError(
                f"approach 2 has no root for N_nv={sizes[~np.isfinite(roots)][0]:g} with fertility "
                f"{fertility.name!r}; drop that size from the list"
            )
        return fit_gamma(sizes, roots * accounting.ladder_width(sizes))

    def fit(self, table: VocabTable, fertility: Fertility, resampling: Resampling) -> DerivativeLaw:
        """gamma from the fertility alone, the anchor from the table's smallest family.

        Draws: anchor budgets within +-12 % times leaving one size out of the list. They show how
        fragile the anchor is; they are no sampling distribution.
        """
        if resampling.cluster is not None:
            raise InputError(
                f"cluster={resampling.cluster!r}: approach 2 draws its anchor and its sizes and "
                "resamples no rows; leave it out"
            )
        require_spread(table.loss, "loss", minimum=1)
        smallest = table.select(table.n_nv == table.n_nv.min())
        low, high = smallest.flops.min(), smallest.flops.max()
        if not low <= self.anchor_flops <= high:
            raise InputError(
                f"the anchor budget {self.anchor_flops:.3g} FLOPs lies outside the smallest "
                f"family's {low:.3g}..{high:.3g}; give --anchor-flops inside it"
            )
        size, n_v0 = best_anchor(table, self.anchor_flops)
        constants = {
            "gamma": self.gamma(fertility),
            "ln_n_v0": float(np.log(n_v0)),
            "ln_n_nv0": float(np.log(self.sizes[0])),
            "ln_k_nnv": budget_constant(table, fertility),
            "alpha_nnv": 0.5,
        }
        resampled, draws = laws.Resampled(), resampling.draws
        if draws:
            random = np.random.default_rng(resampling.seed)
            factors = random.uniform(1 - ANCHOR_RANGE, 1 + ANCHOR_RANGE, draws)
            grid = np.linspace(1 - ANCHOR_RANGE, 1 + ANCHOR_RANGE, 49)
            anchors = np.log([best_anchor(table, self.anchor_flops * f)[1] for f in grid])
            nearest = np.abs(factors[:, None] - grid).argmin(1)
            gammas = np.array([self.gamma(fertility, i) for i in range(1, len(self.sizes))])
            values = {"gamma": random.choice(gammas, draws), "ln_n_v0": anchors[nearest]}
            resampled = laws.Resampled(
                values,
                f"{draws} anchors: {SPREAD}",
                {name: resample.percentile_interval(v) for name, v in values.items()},
            )
        return laws.fitted(
            DerivativeLaw, "derivative", table.digest,
            constants=constants,
            units={"N_nv, N_v": "parameters", "F": "FLOPs"},
            procedure={
                "approach": 2,
                "sizes": list(self.sizes),
                "anchor_flops": self.anchor_flops,
                "anchor_vocab": size,
                "fertility": fertility.to_json(),
            },
            columns=table.ranged,
            draws=resampled,
            diagnostics={"rows": len(table)},
        )  # fmt: skip


def budget_constant(table: VocabTable, fertility: Fertility) -> float:
    """ln k of N_nv = k F^0.5 on the table's envelope (approach 1, Huber): the default budget."""
    densifier = vocab_isoflop.Densifier(table, fertility, converged=False)
    kept = vocab_isoflop.kept_points(table, np.ones(len(table), bool), densifier)
    x, y, weights = (part[:1] for part in vocab_isoflop.log_points([kept]))
    k, _, converged, _ = vocab_isoflop.fit_lines(x, y, weights, np.array([0.5]), "huber")
    if not converged[0]:
        raise InputError("the compute-optimal budget: the fit of the envelope did not converge")
    return float(k[0])
