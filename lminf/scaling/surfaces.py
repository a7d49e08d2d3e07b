"""Values between scattered measurements: linear and C1 cubic on a Delaunay triangulation.

The triangulation and the cubic surface depend on the scale of the coordinates, which are used as
given: the published procedure uses raw parameters and characters. Points outside the hull give
NaN; repeated points count once, with the mean of their values. All of it is SciPy's, as published.
"""

import numpy as np
from jaxtyping import Float
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator, make_interp_spline
from scipy.spatial import Delaunay, QhullError

from lminf.errors import InputError

CLOSE = 1e-9  # of the span: coordinates that are one


class Surface:
    """A triangulated set of points with a value at each; evaluate it anywhere."""

    def __init__(self, points: Float[np.ndarray, "points 2"], values: Float[np.ndarray, " points"]):
        self.points, self.values = merged(points, values)
        self._centre = self.points.mean(0)
        scale = np.ptp(self.points, axis=0)
        try:
            flat = len(self.points) < 3 or np.linalg.matrix_rank(self._moved(self.points)) < 2
            if flat or not scale.all():
                raise QhullError
            self._mesh = Delaunay(self._moved(self.points))
        except QhullError:
            raise InputError(
                f"{len(self.points)} points on one line span no surface; measure a second value "
                "of each coordinate"
            ) from None

    def _moved(self, queries: Float[np.ndarray, "queries 2"]) -> Float[np.ndarray, "queries 2"]:
        return queries - self._centre

    def linear(self, queries: Float[np.ndarray, "queries 2"]) -> Float[np.ndarray, " queries"]:
        """Barycentric interpolation in the triangle of each query."""
        return LinearNDInterpolator(self._mesh, self.values)(self._moved(queries))

    def nearest(self, queries: Float[np.ndarray, "queries 2"]) -> Float[np.ndarray, " queries"]:
        """Value of the nearest point."""
        distance = ((queries[:, None, :] - self.points[None]) ** 2).sum(2)
        return self.values[np.argmin(distance, axis=1)]

    def cubic(
        self, queries: Float[np.ndarray, "queries 2"], *, converged: bool
    ) -> Float[np.ndarray, " queries"]:
        """Clough and Tocher's surface of least bending.

        SciPy finds the gradients by sweeps with an absolute tolerance of 1e-6. Slopes of a loss per
        character are 1e-9, so there it ends after one sweep from zero, and the published
        densification is this, not the minimum. `converged` sweeps over slopes of order one, to the
        end.
        """
        moved = self._moved(queries)
        if not converged:
            return CloughTocher2DInterpolator(self._mesh, self.values)(moved)
        scale = np.ptp(self.points, axis=0).max()  # slopes of order one; the surface is linear
        surface = CloughTocher2DInterpolator(
            self._mesh, self.values * scale, tol=1e-12, maxiter=10_000
        )
        return surface(moved) / scale


def merged(points: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that differ, each with the mean of its values."""
    unique, which = np.unique(points, axis=0, return_inverse=True)
    if len(unique) == len(points):
        return np.asarray(points, np.float64), np.asarray(values, np.float64)
    which = which.ravel()
    return unique, np.bincount(which, values) / np.bincount(which)


def quadratic_spline(
    x: Float[np.ndarray, " points"],
    y: Float[np.ndarray, " points"],
    queries: Float[np.ndarray, " queries"],
) -> Float[np.ndarray, " queries"]:
    """Piecewise quadratic, C1, through all points, continued past the ends; knots midway between
    the points, without the two ends. With fewer than three points the polynomial through them.

    Points closer than CLOSE of the span count once, with their mean.
    """
    order = np.argsort(x, kind="stable")
    x, y = np.asarray(x, np.float64)[order], np.asarray(y, np.float64)[order]
    apart = np.diff(x) > CLOSE * np.ptp(x)
    which = np.concatenate([[0], np.cumsum(apart)])
    count = np.bincount(which)
    x, y = np.bincount(which, x) / count, np.bincount(which, y) / count
    return make_interp_spline(x, y, k=min(2, len(x) - 1))(queries)
