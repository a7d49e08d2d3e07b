"""Approach 1: power laws through the envelope of all loss curves.

Sort all points by FLOPs, keep each that is lower than everything before it, fit ln y = K + alpha
ln F for y in N_nv, N_v and characters H. Source: arXiv:2407.13623, section 4.1.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lminf.errors import InputError
from lminf.scaling import accounting, engine, laws, resample, surfaces, vocab
from lminf.scaling.fertility import Fertility
from lminf.scaling.tables import VocabTable

SELECTORS = ("huber", "ols", "reference")
DENSIFY = ("published", "converged", "none")
GRID_POINTS = 50  # along the diagonal of (N_nv, H)
VOCAB_POINTS = 20  # per family, through the final checkpoints


class Points(NamedTuple):
    n_nv: Float[np.ndarray, " points"]
    n_v: Float[np.ndarray, " points"]
    characters: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]


NONE = Points(*(np.empty(0),) * 5)


def measured(table: VocabTable) -> Points:
    # N_v with the ladder's width where the ladder is that of the sweep, as published; the table's
    # own width is the same number on the published file.
    return Points(table.n_nv, table.n_v, table.characters, table.flops, table.loss)


class Densifier:
    """Interpolated points of a sweep, for any subset of its runs.

    a. per vocabulary size, a cubic surface of the loss over raw (N_nv, H) along the diagonal of
       two geometric grids that span the file;
    b. per family, a quadratic spline through the final losses over V.
    """

    def __init__(
        self, table: VocabTable, fertility: Fertility, how: Literal["published", "converged"]
    ):
        self.table, self.fertility, self.how = table, fertility, how
        self.sizes = np.unique(table.vocab_size)
        # Sorted once: of a long table, comparing every row with every size takes most of the time.
        self._of_size = _with_several(table.vocab_size, table.n_nv, least=2)
        self._of_family = _with_several(table.n_nv, table.vocab_size, least=3)
        self._cache: dict[tuple, Points] = {}
        span = (table.n_nv.min(), table.n_nv.max())
        self._n_nv = np.geomspace(*span, GRID_POINTS)
        self._characters = np.geomspace(table.characters.min(), table.characters.max(), GRID_POINTS)
        self._vocab = np.geomspace(self.sizes[0], self.sizes[-1], VOCAB_POINTS)

    def points(self, keep) -> Points:
        """Interpolated points of the runs of which `keep` [rows] has any row."""
        table, parts = self.table, []
        for size, every in self._of_size.items():
            rows = every[keep[every]]
            key = ("surface", size, tuple(np.unique(table.n_nv[rows])))
            parts.append(self._remember(key, lambda s=size, r=rows: self._surface(s, r)))
        for family, every in self._of_family.items():
            rows = every[keep[every]]
            key = ("spline", family, tuple(np.unique(table.vocab_size[rows])))
            parts.append(self._remember(key, lambda f=family, r=rows: self._spline(f, r)))
        parts.append(NONE)
        return Points(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _remember(self, key, make) -> Points:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _points(self, n_nv, n_v, vocab_size, characters, loss) -> Points:
        tokens = characters * self.fertility.tokens_per_character(vocab_size)
        return Points(n_nv, n_v, characters, 6 * (n_nv + n_v) * tokens, loss)

    def _surface(self, size, rows) -> Points:
        table = self.table
        if np.unique(table.n_nv[rows]).size < 2:
            return NONE
        points = np.stack([table.n_nv[rows], table.characters[rows]], axis=1)
        at = np.stack([self._n_nv, self._characters], axis=1)
        try:
            surface = surfaces.Surface(points, table.loss[rows])
        except InputError:  # two runs, or points on one line: nothing lies between them
            return NONE
        found = surface.cubic(at, converged=self.how == "converged")
        inside = np.isfinite(found)
        n_nv = self._n_nv[inside]
        n_v = size * accounting.ladder_width(n_nv)
        return self._points(n_nv, n_v, size, self._characters[inside], found[inside])

    def _spline(self, family, rows) -> Points:
        table = self.table
        sizes = np.unique(table.vocab_size[rows])
        if sizes.size < 3:
            return NONE
        final, most = [], 0.0
        for size in sizes:
            run = rows[table.vocab_size[rows] == size]
            last = run[table.characters[run] == table.characters[run].max()]  # one for each seed
            final.append(table.loss[last].mean())
            most = max(most, table.tokens[last[0]])
        inside = (self._vocab >= sizes[0] * (1 - 1e-12)) & (self._vocab <= sizes[-1] * (1 + 1e-12))
        at = np.clip(self._vocab[inside], sizes[0], sizes[-1])
        loss = surfaces.quadratic_spline(sizes, np.array(final), at)
        characters = most / self.fertility.tokens_per_character(at)
        n_nv = np.full(at.size, family)
        return self._points(
            n_nv, at * table.width[self._of_family[family][0]], at, characters, loss
        )


def _with_several(of, values, *, least: int) -> dict[float, Int[np.ndarray, " rows"]]:
    """Rows of each value of `of` that has at least so many different `values`, by rising value."""
    order = np.argsort(of, kind="stable")
    found, first = np.unique(of[order], return_index=True)
    groups = dict(zip(map(float, found), np.split(order, first[1:]), strict=True))
    return {key: rows for key, rows in groups.items() if np.unique(values[rows]).size >= least}


def envelope(points: Points) -> Points:
    """Points that are strictly lower than all with fewer FLOPs."""
    order = np.argsort(points.flops, kind="stable")
    loss = points.loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    keep = order[loss < before]
    return Points(*(column[keep] for column in points))


def line_residual(theta, columns):
    """K + alpha x - y."""
    return theta[0] + theta[1] * columns["x"] - columns["y"]


def fit_lines(x, y, weights, slopes, selector: str):
    """(K [lines], alpha [lines], converged, objective) of ln y = K + alpha ln x, Huber 1e-3.

    x, y, weights are [lines, points]; a slope of NaN is fitted, another one is imposed.
    """
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
        return mean - slope * centre, slope, sound, left.sum(1)
    lower = np.stack([np.full(len(x), -200.0), np.where(free, -5.0, slopes)], axis=1)
    upper = np.stack([np.full(len(x), 200.0), np.where(free, 5.0, slopes)], axis=1)
    starts = np.array([[y[weights > 0].mean(), slope] for slope in (0.2, 0.5, 0.8)])
    found = engine.minimise(
        line_residual, {"x": shifted, "y": y}, starts=starts, lower=lower, upper=upper,
        weights=weights,
    )  # fmt: skip
    slope = found.parameters[:, 1]
    return found.parameters[:, 0] - slope * centre, slope, found.converged & sound, found.objective


def reference_line(x, y, slope: float) -> tuple[float, float, float]:
    """(K, alpha, Huber objective) as released: a search that stops early.

    Quasi-Newton with forward differences from a 20 x 20 grid (K in [-20, 15], alpha in [0, 1]),
    stopping when a step gains less than 2.2e-9 or the slope is under 1e-5; of the end points the
    one with least mean(r^2) / mean(y)^2. With a Huber threshold of 1e-3 it stops almost where it
    starts, so this is close to least squares among 400 grid points and not a minimum.
    """
    free = np.isnan(slope)

    def objective(theta):
        residual = theta[0] + (theta[1] if free else slope) * x - y
        size = np.abs(residual)
        return np.where(size <= 1e-3, residual**2 / 2, 1e-3 * (size - 5e-4)).sum()

    best, kept = np.inf, np.array([np.nan, np.nan])
    for first in np.linspace(-20, 15, 20):
        for second in np.linspace(0, 1, 20) if free else (slope,):
            theta = _quasi_newton(objective, np.array([first, second] if free else [first]))
            residual = theta[0] + (theta[1] if free else slope) * x - y
            error = np.mean(residual**2) / np.mean(y) ** 2
            if error < best:
                best, kept = error, theta
    end = float(kept[1]) if free else slope
    return float(kept[0]), end, float(objective(kept))


def _quasi_newton(objective, theta, gain=2.2e-9, flat=1e-5):
    """BFGS with forward differences and halving steps, with the released code's stopping rules."""
    shift = 1e-8

    def slope_at(theta, here):
        ahead = [objective(theta + shift * unit) for unit in np.eye(theta.size)]
        return (np.array(ahead) - here) / shift

    here = objective(theta)
    slope = slope_at(theta, here)
    inverse = np.eye(theta.size) / max(np.linalg.norm(slope), 1e-300)
    for _ in range(200):
        if np.abs(slope).max() <= flat:
            break
        step = -inverse @ slope
        if step @ slope >= 0:
            step = -slope / np.linalg.norm(slope)
        length, new = 1.0, objective(theta + step)
        while new > here + 1e-3 * length * (step @ slope) and length > 1e-6:
            length /= 2
            new = objective(theta + length * step)
        if new >= here:
            break
        moved = length * step
        theta = theta + moved
        new_slope = slope_at(theta, new)
        change = new_slope - slope
        enough = (here - new) / max(abs(here), abs(new), 1.0) > gain
        here, slope = new, new_slope
        if not enough:
            break
        curvature = moved @ change
        if curvature > 1e-16:
            rotate = np.eye(theta.size) - np.outer(moved, change) / curvature
            inverse = rotate @ inverse @ rotate.T + np.outer(moved, moved) / curvature
    return theta


@dataclass(frozen=True, kw_only=True)
class IsoflopLaw(vocab.VocabLaw):
    """N_nv, N_v and H as powers of F. N_v follows from the budget alone."""

    kind = "vocab-isoflop"

    def n_v(self, constants, *, n_nv, width, flops):
        return np.exp(constants["ln_k_nv"] + constants["alpha_nv"] * np.log(flops))


@dataclass(frozen=True)
class VocabLaw1:
    """Procedure of approach 1. `selector`: huber (true optimum), ols, reference (as released)."""

    selector: str = "huber"
    densify: str = "published"
    exponents: str = "imposed"  # 0.5 for N_nv and H; "free" fits them

    def __post_init__(self):
        for name, value, valid in (
            ("selector", self.selector, SELECTORS),
            ("densify", self.densify, DENSIFY),
            ("exponents", self.exponents, ("imposed", "free")),
        ):
            if value not in valid:
                raise InputError(f"approach 1: {name}={value!r} is unknown; use one of {valid}")

    def fit(
        self,
        table: VocabTable,
        *,
        fertility: Fertility,
        draws: int = 300,
        cluster: str = "run",
        seed: int = 0,
    ) -> IsoflopLaw:
        laws.require_spread(table.n_nv, "Non_vocab_parameters")
        laws.require_spread(table.vocab_size, "vocab_size")
        laws.require_spread(table.loss, "loss", minimum=1)
        imposed = 0.5 if self.exponents == "imposed" else np.nan
        slopes = np.array([imposed, np.nan, imposed])
        kept = self.envelope(table, fertility, np.ones(len(table), bool))
        laws.require_spread(kept.flops, "budget on the envelope", minimum=1)
        x, y, weights = _stack([kept])
        if self.selector == "reference":
            lines = [reference_line(x[i], y[i], slopes[i]) for i in range(3)]
            k, alpha, objective = (np.array(part) for part in zip(*lines, strict=True))
        else:
            k, alpha, converged, objective = fit_lines(x, y, weights, slopes, self.selector)
            if not converged.all():
                raise InputError("approach 1: the fit of the envelope did not converge")
        names = ("nnv", "nv", "h")
        constants = {f"ln_k_{name}": float(v) for name, v in zip(names, k, strict=True)}
        constants |= {f"alpha_{name}": float(v) for name, v in zip(names, alpha, strict=True)}
        drawn, how, spans, notes = self._draws(table, fertility, draws, cluster, seed, slopes)
        return IsoflopLaw(
            version=f"isoflop-{self.selector}-{table.digest[:8]}",
            source=f"data sha256 {table.digest}",
            constants=constants,
            units={"N_nv, N_v": "parameters", "H": "characters", "F": "FLOPs", "k": "natural log"},
            procedure={
                "approach": 1,
                "selector": self.selector,
                "densify": self.densify,
                "exponents": self.exponents,
                "fertility": fertility.to_json(),
            },
            fitted_range=fitted_range(table),
            draws=drawn,
            resampling=how,
            intervals=spans,
            warnings=notes,
            diagnostics={
                "points_kept": len(kept.loss),
                "rows": len(table),
                "objective_n_v": float(objective[1]),
                "objective": "sum of Huber(1e-3)" if self.selector != "ols" else "sum of squares",
            },
        )

    def envelope(self, table: VocabTable, fertility: Fertility, keep, densifier=None) -> Points:
        """Kept points of the rows in `keep`, densified as the procedure says."""
        raw = Points(*(column[keep] for column in measured(table)))
        if self.densify != "none":
            how = "published" if self.densify == "published" else "converged"
            densifier = densifier or Densifier(table, fertility, how)
            more = densifier.points(keep)
            raw = Points(*(np.concatenate(pair) for pair in zip(raw, more, strict=True)))
        return envelope(raw)

    def _draws(self, table, fertility, draws, cluster, seed, slopes):
        if not draws:
            return {}, "", {}, ()
        weights = resample.bootstrap_weights(clusters(table, cluster), draws=draws, seed=seed)
        densifier = None
        if self.densify != "none":
            how = "published" if self.densify == "published" else "converged"
            densifier = Densifier(table, fertility, how)
        kept = [self.envelope(table, fertility, row > 0, densifier) for row in weights]
        x, y, weight = _stack(kept)
        # The reference search is no estimator of anything under resampling; its optimum is.
        selector = "ols" if self.selector == "ols" else "huber"
        k, alpha, converged, _ = fit_lines(x, y, weight, np.tile(slopes, draws), selector)
        k, alpha, converged = (part.reshape(draws, 3) for part in (k, alpha, converged))
        named = {f"ln_k_{name}": k[:, i] for i, name in enumerate(("nnv", "nv", "h"))}
        named |= {f"alpha_{name}": alpha[:, i] for i, name in enumerate(("nnv", "nv", "h"))}
        how = f"{draws} bootstrap draws over {cluster}s"
        return laws.draw_summary(named, np.asarray(converged.all(axis=1)), how)


def _stack(kept: list[Points]):
    """ln F and the three targets as [3 * draws, points], with weight 0 where a draw has fewer."""
    longest = max(len(points.loss) for points in kept)
    longest += -longest % engine.ROW_MULTIPLE
    x = np.zeros((len(kept), 3, longest))
    y, weights = np.zeros_like(x), np.zeros_like(x)
    for index, points in enumerate(kept):
        count = len(points.loss)
        x[index, :, :count] = np.log(points.flops)
        for line, target in enumerate((points.n_nv, points.n_v, points.characters)):
            y[index, line, :count] = np.log(target)
        weights[index, :, :count] = 1
    if len(kept) == 1:
        used = int(weights[0, 0].sum())
        x, y, weights = x[..., :used], y[..., :used], weights[..., :used]
    shape = (-1, x.shape[-1])
    return x.reshape(shape), y.reshape(shape), weights.reshape(shape)


def clusters(table: VocabTable, cluster: str):
    if cluster == "row":
        return np.arange(len(table))
    if cluster in ("run", "family"):
        return getattr(table, cluster)
    raise InputError(f"cluster={cluster!r} is unknown for a vocabulary sweep; use run, family, row")


def fitted_range(table: VocabTable) -> dict[str, tuple[float, float]]:
    return {
        "n_nv": (float(table.n_nv.min()), float(table.n_nv.max())),
        "flops": (float(table.flops.min()), float(table.flops.max())),
        "vocab": (float(table.vocab_size.min()), float(table.vocab_size.max())),
    }
