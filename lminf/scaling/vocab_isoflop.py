"""Approach 1: power laws through the envelope of all loss curves.

Sort all points by FLOPs, keep each that is lower than everything before it, fit ln y = K + alpha
ln F for y in N_nv, N_v and characters H. Source: arXiv:2407.13623, section 4.1.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import optimize

from lminf.errors import InputError
from lminf.scaling import accounting, laws, robust_fit, surfaces, vocab
from lminf.scaling.fertility import Fertility
from lminf.scaling.resample import Resampling
from lminf.scaling.robust_fit import Columns, Numbers
from lminf.scaling.tables import VocabTable, require_spread
from lminf.scaling.vocab import Constants, Draws

SELECTORS = ("huber", "ols", "reference")
DENSIFY = ("published", "converged", "none")
EXPONENTS = ("imposed", "free")
GRID_POINTS = 50  # along the diagonal of (N_nv, H)
VOCAB_POINTS = 20  # per family, through the final checkpoints


class Points(NamedTuple):
    n_nv: Float[np.ndarray, " points"]
    n_v: Float[np.ndarray, " points"]
    characters: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]


PerLine = Float[np.ndarray, "lines points"]
NO_POINTS = Points(*(np.empty(0),) * 5)


def measured(table: VocabTable) -> Points:
    """The rows of the table as points."""
    return Points(table.n_nv, table.n_v, table.characters, table.flops, table.loss)


def joined(parts: Iterable[Points]) -> Points:
    """The points of all parts."""
    return Points(*map(np.concatenate, zip(*parts, strict=True)))


class Densifier:
    """Interpolated points of a sweep, for any subset of its runs.

    a. per vocabulary size, a cubic surface of the loss over raw (N_nv, H) along the diagonal of
       two geometric grids that span the file;
    b. per family, a quadratic spline through the final losses over V.
    """

    def __init__(self, table: VocabTable, fertility: Fertility, *, converged: bool):
        self.table, self.fertility, self.converged = table, fertility, converged
        # Sorted once: of a long table, comparing every row with every size takes most of the time.
        self._of_size = _with_several(table.vocab_size, table.n_nv, least=2)
        self._of_family = _with_several(table.n_nv, table.vocab_size, least=3)
        self._cache: dict[tuple, Points] = {}
        self._n_nv = np.geomspace(table.n_nv.min(), table.n_nv.max(), GRID_POINTS)
        self._characters = np.geomspace(table.characters.min(), table.characters.max(), GRID_POINTS)
        sizes = table.vocab_size
        self._vocab = np.geomspace(sizes.min(), sizes.max(), VOCAB_POINTS)

    def points(self, keep: Bool[np.ndarray, " rows"]) -> Points:
        """Interpolated points of the runs of which `keep` has any row."""
        table, parts = self.table, [NO_POINTS]
        for interpolate, groups, members in (
            (self._surface, self._of_size, table.n_nv),
            (self._spline, self._of_family, table.vocab_size),
        ):
            for value, group in groups.items():
                rows = group[keep[group]]
                key = (interpolate.__name__, value, tuple(np.unique(members[rows])))
                if key not in self._cache:
                    self._cache[key] = interpolate(value, rows)
                parts.append(self._cache[key])
        return joined(parts)

    def _points(self, n_nv, n_v, vocab_size, characters, loss) -> Points:
        tokens = characters * self.fertility.tokens_per_character(vocab_size)
        return Points(n_nv, n_v, characters, 6 * (n_nv + n_v) * tokens, loss)

    def _surface(self, size: float, rows: Int[np.ndarray, " rows"]) -> Points:
        """Points of one vocabulary size; none where its runs span no surface."""
        points = np.stack([self.table.n_nv[rows], self.table.characters[rows]], axis=1)
        diagonal = np.stack([self._n_nv, self._characters], axis=1)
        try:
            surface = surfaces.Surface(points, self.table.loss[rows])
        except InputError:  # two runs, or points on one line: nothing lies between them
            return NO_POINTS
        loss = surface.cubic(diagonal, converged=self.converged)
        inside = np.isfinite(loss)
        n_nv = self._n_nv[inside]
        n_v = size * accounting.ladder_width(n_nv)
        return self._points(n_nv, n_v, size, self._characters[inside], loss[inside])

    def _spline(self, family: float, rows: Int[np.ndarray, " rows"]) -> Points:
        """Points of one family; none where it has fewer than three vocabulary sizes."""
        table = self.table
        sizes = np.unique(table.vocab_size[rows])
        if sizes.size < 3:
            return NO_POINTS
        final, most = [], 0.0
        for size in sizes:
            run = rows[table.vocab_size[rows] == size]
            last = run[table.characters[run] == table.characters[run].max()]  # one for each seed
            final.append(table.loss[last].mean())
            most = max(most, table.tokens[last[0]])
        inside = (self._vocab >= sizes[0] * (1 - 1e-12)) & (self._vocab <= sizes[-1] * (1 + 1e-12))
        size = np.clip(self._vocab[inside], sizes[0], sizes[-1])
        loss = surfaces.quadratic_spline(sizes, np.array(final), size)
        characters = most / self.fertility.tokens_per_character(size)
        n_v = size * table.width[self._of_family[family][0]]
        return self._points(np.full(size.size, family), n_v, size, characters, loss)


def _with_several(
    keys: np.ndarray, values: np.ndarray, *, least: int
) -> dict[float, Int[np.ndarray, " rows"]]:
    """Rows of each key that has at least so many different values, by rising key."""
    order = np.argsort(keys, kind="stable")
    unique, first = np.unique(keys[order], return_index=True)
    groups = dict(zip(map(float, unique), np.split(order, first[1:]), strict=True))
    return {key: rows for key, rows in groups.items() if np.unique(values[rows]).size >= least}


def envelope(points: Points) -> Points:
    """Points that are strictly lower than all with fewer FLOPs."""
    order = np.argsort(points.flops, kind="stable")
    loss = points.loss[order]
    lowest_before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    keep = order[loss < lowest_before]
    return Points(*(column[keep] for column in points))


def kept_points(
    table: VocabTable, keep: Bool[np.ndarray, " rows"], densifier: Densifier | None
) -> Points:
    """The envelope of some rows of a table and of what the densifier puts between them."""
    points = Points(*(column[keep] for column in measured(table)))
    return envelope(points if densifier is None else joined([points, densifier.points(keep)]))


def line_residual(theta: Numbers, columns: Columns) -> Array:
    """K + alpha x - y."""
    return theta[0] + theta[1] * columns["x"] - columns["y"]


class Lines(NamedTuple):
    """ln y = K + alpha ln x."""

    k: Float[np.ndarray, " lines"]
    alpha: Float[np.ndarray, " lines"]
    converged: Bool[np.ndarray, " lines"]
    objective: Float[np.ndarray, " lines"]


def fit_lines(
    x: PerLine, y: PerLine, weights: PerLine, slopes: Float[np.ndarray, " lines"], selector: str
) -> Lines:
    """The lines by least squares ("ols") or Huber(1e-3); a slope of NaN is fitted, another one is
    imposed."""
    centre = np.sum(weights * x, axis=1) / weights.sum(axis=1)
    free = np.isnan(slopes)
    shifted = np.where(weights > 0, x - centre[:, None], 0.0)
    y = np.where(weights > 0, y, 0.0)
    spread = np.sum(weights * shifted**2, axis=1)
    sound = ~free | (spread > 1e-12)  # a free slope needs two budgets
    if selector == "ols":
        mean = np.sum(weights * y, axis=1) / weights.sum(axis=1)
        fitted = np.sum(weights * shifted * (y - mean[:, None]), axis=1)
        fitted /= np.where(sound, spread, 1.0)
        slope = np.where(free, fitted, slopes)
        left = weights * (y - mean[:, None] - slope[:, None] * shifted) ** 2
        return Lines(mean - slope * centre, slope, sound, left.sum(1))
    lower = np.stack([np.full(len(x), -200.0), np.where(free, -5.0, slopes)], axis=1)
    upper = np.stack([np.full(len(x), 200.0), np.where(free, 5.0, slopes)], axis=1)
    starts = np.array([[y[weights > 0].mean(), slope] for slope in (0.2, 0.5, 0.8)])
    lines = robust_fit.minimise(
        line_residual, {"x": shifted, "y": y}, starts=starts, lower=lower, upper=upper,
        weights=weights,
    )  # fmt: skip
    k, slope = lines.parameters.T
    return Lines(k - slope * centre, slope, lines.converged & sound, lines.objective)


def reference_line(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], slope: float
) -> tuple[float, float, float]:
    """(K, alpha, Huber objective) as released: a search that stops early.

    L-BFGS-B with finite differences from a 20 x 20 grid (K in [-20, 15], alpha in [0, 1]); of the
    end points the one with least mean(r^2) / mean(y)^2. With a Huber threshold of 1e-3 it stops
    almost where it starts, so this is close to least squares among 400 points and not a minimum.
    """
    free = np.isnan(slope)

    def residuals(theta: Float[np.ndarray, "ends parameters"]) -> Float[np.ndarray, "ends points"]:
        return theta[:, :1] + (theta[:, 1:] if free else slope) * x - y

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The Huber sum and its forward differences, which are SciPy's own, in one call."""
        ahead = theta + 1e-8 * np.eye(theta.size)
        size = np.abs(residuals(np.vstack([theta[None], ahead])))
        values = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum(1)
        return values[0], (values[1:] - values[0]) / (np.diag(ahead) - theta)

    grid = [np.linspace(-20, 15, 20)] + [np.linspace(0, 1, 20)] * int(free)
    starts = map(np.array, itertools.product(*grid))
    ends = [optimize.minimize(objective, start, jac=True, method="L-BFGS-B").x for start in starts]
    best = ends[np.argmin(np.mean(residuals(np.array(ends)) ** 2, axis=1))]
    return float(best[0]), float(best[1]) if free else slope, float(objective(best)[0])


@dataclass(frozen=True, kw_only=True)
class IsoflopLaw(vocab.VocabLaw):
    """N_nv, N_v and H as powers of F. N_v follows from the budget alone."""

    kind = "vocab-isoflop"

    def n_v(self, constants: Constants, *, n_nv: float, width: float, flops: Draws) -> Draws:
        return np.exp(constants["ln_k_nv"] + constants["alpha_nv"] * np.log(flops))


@dataclass(frozen=True)
class IsoflopFit:
    """Procedure of approach 1. `selector`: huber (true optimum), ols, reference (as released).

    Resampled runs are not densified: between the curves of a resample the interpolation invents
    points of the envelope, whose lower ends are about 6,000 entries for a model of any size. Only
    "reference" resamples as released.
    """

    selector: str = "huber"
    densify: str = "published"
    exponents: str = "imposed"  # 0.5 for N_nv and H; "free" fits them

    def __post_init__(self):
        laws.require_choice("selector", self.selector, SELECTORS)
        laws.require_choice("densify", self.densify, DENSIFY)
        laws.require_choice("exponents", self.exponents, EXPONENTS)

    def fit(self, table: VocabTable, fertility: Fertility, resampling: Resampling) -> IsoflopLaw:
        """The law of the table; InputError where the table does not determine it."""
        table.require_spread()
        imposed = 0.5 if self.exponents == "imposed" else np.nan
        slopes = np.array([imposed, np.nan, imposed])
        densifier = None
        if self.densify != "none":
            densifier = Densifier(table, fertility, converged=self.densify == "converged")
        kept = kept_points(table, np.ones(len(table), bool), densifier)
        require_spread(kept.flops, "budget on the envelope", minimum=1)
        points = log_points([kept])
        if self.selector == "reference":
            searches = map(reference_line, points[0], points[1], slopes)
            k, alpha, objective = (np.array(part) for part in zip(*searches, strict=True))
        else:
            k, alpha, converged, objective = fit_lines(*points, slopes, self.selector)
            if not converged.all():
                raise InputError("approach 1: the fit of the envelope did not converge")
        resampled, draws = laws.Resampled(), resampling.draws
        if draws:
            rows = resampling.weights(table)
            between = densifier if self.selector == "reference" else None
            sampled = log_points([kept_points(table, row > 0, between) for row in rows])
            # The reference search is no estimator of anything under resampling; its optimum is.
            selector = "ols" if self.selector == "ols" else "huber"
            how = "as released, with interpolation" if between else "without interpolation"
            lines = fit_lines(*sampled, np.tile(slopes, draws), selector)
            draws_k, draws_alpha, converged = (part.reshape(draws, 3) for part in lines[:3])
            resampled = laws.resampled(
                _named(draws_k.T, draws_alpha.T),
                np.all(converged, axis=1),
                f"{resampling.described(table)} of {len(table):,} rows, {how}",
            )
        return laws.fitted(
            IsoflopLaw, f"isoflop-{self.selector}", table.digest,
            constants=_named(k, alpha),
            units={"N_nv, N_v": "parameters", "H": "characters", "F": "FLOPs", "k": "natural log"},
            procedure={"approach": 1, **vars(self), "fertility": fertility.to_json()},
            columns=table.ranged,
            draws=resampled,
            diagnostics={
                "points_kept": len(kept.loss),
                "rows": len(table),
                "objective_n_v": float(objective[1]),
                "objective": "sum of Huber(1e-3)" if self.selector != "ols" else "sum of squares",
            },
        )  # fmt: skip


def _named(k: np.ndarray, alpha: np.ndarray) -> dict[str, Any]:
    """The constants of the lines of N_nv, N_v and H by name."""
    names = [f"{kind}_{name}" for kind in ("ln_k", "alpha") for name in ("nnv", "nv", "h")]
    return dict(zip(names, (*k, *alpha), strict=True))


def log_points(kept: list[Points]) -> tuple[PerLine, PerLine, PerLine]:
    """(ln F, ln of the target, weights) of three lines for each draw, of N_nv, N_v and H; the
    weight is 0 where a draw has fewer points than another."""
    longest = max(len(points.loss) for points in kept)
    if len(kept) > 1:
        longest += -longest % robust_fit.ROW_MULTIPLE

    def padded(columns: Iterable[np.ndarray]) -> PerLine:
        return np.stack([np.pad(column, (0, longest - len(column))) for column in columns])

    lines = [(p, target) for p in kept for target in (p.n_nv, p.n_v, p.characters)]
    return (
        padded(np.log(points.flops) for points, _ in lines),
        padded(np.log(target) for _, target in lines),
        padded(np.ones_like(target) for _, target in lines),
    )
