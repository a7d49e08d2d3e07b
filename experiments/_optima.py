"""Where the loss of a vocabulary sweep is least: by size, by a parabola, by one joint surface."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import linalg, optimize

from lminf.experiments import _noise
from lminf.run.folder import Row

NEAR = 3  # the surface is fitted to sizes within this factor of the best one of their budget
RESAMPLED = 300  # of the runs, for the interval of the surface's optima


def curve(rows: list[Row], n_nv: int, budget: float, metric: str) -> _noise.Curve:
    """Of each size the mean over seeds of `metric` at its best rate, by rising size; of the rates
    at which every size was trained, where there are any."""
    cells = [row for row in rows if (row["n_nv"], row["budget"]) == (n_nv, budget)]
    settings = _noise.settings(cells, ("vocab_size", "lr"), metric)
    sizes = sorted({size for size, _ in settings})
    rates = {lr for _, lr in settings}
    common = {lr for lr in rates if all((size, lr) in settings for size in sizes)} or rates
    best = [
        min((float(np.mean(values)), lr, values)
            for (of, lr), values in settings.items() if of == size and lr in common)
        for size in sizes
    ]  # fmt: skip
    return _noise.Curve(
        np.array(sizes), tuple(values for *_, values in best), tuple(lr for _, lr, _ in best)
    )


def budgets_of(rows: list[Row]) -> list[tuple[int, float]]:
    return sorted({(row["n_nv"], row["budget"]) for row in rows})


@dataclass(frozen=True)
class Surface:
    """The loss as a quadratic in ln N_v, ln N_nv and ln D, by least squares to all rows near the
    optima: a curvature in each direction and no asymptotes, which runs this short would not
    determine. A cube of ln N_v, because equal FLOPs leave a large vocabulary few tokens, so that
    its side of a bowl is the steeper one. With draws of it, of resampled runs.
    """

    rows: list[Row]
    metric: str
    without: int | None = None  # a size that is left out

    @cached_property
    def near(self) -> list[Row]:
        kept = []
        for n_nv, budget in budgets_of(self.rows):
            by_size = curve(self.rows, n_nv, budget, self.metric)
            best = by_size.x[np.argmin(by_size.means)]
            rates = {
                size: lr for size, lr in zip(by_size.x, by_size.labels, strict=True)
                if best / NEAR <= size <= best * NEAR and size != self.without
            }  # fmt: skip
            kept += [
                row for row in self.rows if (row["n_nv"], row["budget"]) == (n_nv, budget)
                and rates.get(row["vocab_size"]) == row["lr"]
            ]  # fmt: skip
        return kept

    @cached_property
    def design(self) -> tuple[np.ndarray, np.ndarray]:
        """(terms of the rows, their losses)."""
        names = ("n_v", "n_nv", "tokens", self.metric)
        *sizes, loss = np.array([[row[name] for name in names] for row in self.near]).T
        return polynomial(*sizes), loss

    def fit(self, weights: np.ndarray) -> np.ndarray | None:
        """The coefficients; None where the rows do not determine them."""
        (terms, loss), root = self.design, np.sqrt(weights)
        coefficients, _, rank, _ = linalg.lstsq(terms * root[:, None], loss * root)
        return coefficients if rank == terms.shape[1] else None

    @property
    def misfit(self) -> float | None:
        """Root mean square of what it misses the rows by."""
        if self.point is None:
            return None
        terms, loss = self.design
        return float(np.sqrt(np.mean((terms @ self.point - loss) ** 2)))

    @cached_property
    def point(self) -> np.ndarray | None:
        return self.fit(np.ones(len(self.near)))

    @cached_property
    def draws(self) -> list[np.ndarray]:
        """Coefficients of resampled runs: what one seed trained of one shape and size."""
        ids = [(row["n_nv"], row["vocab_size"], row["seed"]) for row in self.near]
        runs = {run: i for i, run in enumerate(dict.fromkeys(ids))}
        of_row, random = np.array([runs[run] for run in ids]), np.random.default_rng(0)
        fits = (
            self.fit(np.bincount(random.integers(0, len(runs), len(runs)),
                                 minlength=len(runs))[of_row].astype(float))
            for _ in range(RESAMPLED)
        )  # fmt: skip
        return [coefficients for coefficients in fits if coefficients is not None]

    def optimum(self, n_nv: int, budget: float, coefficients: np.ndarray | None) -> float | None:
        """V of the least loss at a budget; None without a surface, or where it falls to an end of
        the sizes."""
        if coefficients is None:
            return None
        width = next(row["width"] for row in self.rows if row["n_nv"] == n_nv)
        ends = [f(row["vocab_size"] for row in self.rows if row["n_nv"] == n_nv)
                for f in (min, max)]  # fmt: skip

        def loss(log_v: float) -> float:
            n_v = np.exp(log_v) * width
            row = polynomial(*np.array([[n_v], [n_nv], [budget / (6 * (n_nv + n_v))]]))
            return float(row[0] @ coefficients)

        least = optimize.minimize_scalar(loss, bounds=np.log(ends), method="bounded")
        v = float(np.exp(least.x))
        return v if ends[0] * 1.01 < v < ends[1] / 1.01 else None

    def sampled(self, n_nv: int, budget: float) -> np.ndarray:
        """Optima of the draws; NaN where one has none."""
        optima = [self.optimum(n_nv, budget, draw) for draw in self.draws]
        return np.array(optima, float)


def polynomial(n_v: np.ndarray, n_nv: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[rows, 11]: 1, the logarithms, their products, and the cube of the first."""
    x = [np.log(value / 1e5) for value in (n_v, n_nv, tokens)]
    products = [x[i] * x[j] for i in range(3) for j in range(i, 3)]
    return np.stack([np.ones_like(x[0]), *x, *products, x[0] ** 3], 1)


@dataclass(frozen=True)
class Optimum:
    """Where one loss of one shape and budget is least, by each method (entries)."""

    n_nv: int
    budget: float
    by_size: _noise.Curve
    parabola: tuple[float | None, float | None, float | None]  # with its interval
    surface: float | None
    draws: np.ndarray
    without_a_size: list[float]  # the surface's, each size left out in turn
    misfit: float | None  # of the whole surface, root mean square

    @property
    def bracketed(self) -> bool:
        """Whether sizes below and above are told apart from the best one."""
        return None not in _noise.bracket(self.by_size)

    @property
    def methods(self) -> list[float]:
        least = float(self.by_size.x[np.argmin(self.by_size.means)])
        return [v for v in (least, self.parabola[0], self.surface) if v is not None]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the surface's optima over resampled runs."""
        finite = self.draws[np.isfinite(self.draws)]
        if self.surface is None or len(finite) < 0.9 * RESAMPLED:
            return None
        low, high = np.percentile(finite, [2.5, 97.5])
        return float(low), float(high)


def optima_of(rows: list[Row], metric: str) -> list[Optimum]:
    """Of every shape and budget."""
    surface = Surface(rows, metric)
    left_out = [Surface(rows, metric, size) for size in sorted({r["vocab_size"] for r in rows})]
    optima = []
    for n_nv, budget in budgets_of(rows):
        by_size = curve(rows, n_nv, budget, metric)
        if len(by_size.x) < 2:
            continue
        without = [one.optimum(n_nv, budget, one.point) for one in left_out]
        optima.append(Optimum(
            n_nv, budget, by_size, _noise.optimum(by_size),
            surface.optimum(n_nv, budget, surface.point), surface.sampled(n_nv, budget),
            [v for v in without if v is not None], surface.misfit,
        ))  # fmt: skip
    return optima
