"""Values between scattered measurements: linear and C1 cubic on a Delaunay triangulation.

Coordinates are used as given: the triangulation and the cubic surface depend on their scale, and
the published procedure uses raw parameters and characters. Points outside the hull give NaN.

Cubic: Clough and Tocher's element (three cubic Bezier patches per triangle, C1), with the cross
derivative along an edge linear in the direction that joins neighbouring centroids, which makes the
surface independent of affine maps once the gradients are given. Gradients at the points minimise
the bending of the surface's curves along the edges.
Sources: Alfeld 1984 (CAGD 1:169); Farin 1986 (CAGD 3:83); Nielson 1983 (Math. Comp. 40:253).
"""

import numpy as np
from jaxtyping import Float, Int
from matplotlib.tri import Triangulation

from lminf.errors import InputError

HULL_TOLERANCE = 1e-12  # barycentric; a point on an edge belongs to the triangle


class Surface:
    """A triangulated set of points; evaluate any values on it."""

    def __init__(self, points: Float[np.ndarray, "points 2"]):
        self.points = np.asarray(points, np.float64)
        if len(self.points) < 3 or np.linalg.matrix_rank(self.points - self.points.mean(0)) < 2:
            raise InputError(
                f"{len(self.points)} points on one line span no surface; measure a second value "
                "of each coordinate"
            )
        mesh = Triangulation(self.points[:, 0], self.points[:, 1])
        self.triangles: Int[np.ndarray, "triangles 3"] = np.asarray(mesh.triangles)
        self._neighbours = np.asarray(mesh.neighbors)  # of edge (i, i + 1)
        self._edges = np.asarray(mesh.edges)
        corner = self.points[self.triangles]
        sides = np.stack([corner[:, 0] - corner[:, 2], corner[:, 1] - corner[:, 2]], axis=2)
        # Three points of a triangle may lie on one line up to rounding; it holds no query.
        area = np.abs(np.linalg.det(sides))
        self._flat = area <= 1e-14 * (sides**2).sum((1, 2))
        sides[self._flat] = np.eye(2)
        self._inverse = np.linalg.inv(sides)
        self._last = corner[:, 2]

    def _barycentric(self, triangle, at: Float[np.ndarray, "queries 2"]):
        first = np.einsum("qij,qj->qi", self._inverse[triangle], at - self._last[triangle])
        return np.concatenate([first, 1 - first.sum(1, keepdims=True)], axis=1)

    def locate(self, at: Float[np.ndarray, "queries 2"]):
        """Triangle of each query (-1 outside) and its barycentric coordinates there."""
        offset = at[:, None, :] - self._last[None]
        first = np.einsum("tij,qtj->qti", self._inverse, offset)
        weights = np.concatenate([first, 1 - first.sum(2, keepdims=True)], axis=2)
        weights[:, self._flat] = -np.inf
        triangle = np.argmax(weights.min(2), axis=1)
        chosen = weights[np.arange(len(at)), triangle]
        return np.where(chosen.min(1) >= -HULL_TOLERANCE, triangle, -1), chosen

    def linear(
        self, values: Float[np.ndarray, " points"], at: Float[np.ndarray, "queries 2"]
    ) -> Float[np.ndarray, " queries"]:
        triangle, weights = self.locate(at)
        inside = triangle >= 0
        found = np.full(len(at), np.nan)
        corners = values[self.triangles[triangle[inside]]]
        found[inside] = np.sum(weights[inside] * corners, axis=1)
        return found

    def nearest(
        self, values: Float[np.ndarray, " points"], at: Float[np.ndarray, "queries 2"]
    ) -> Float[np.ndarray, " queries"]:
        distance = ((at[:, None, :] - self.points[None]) ** 2).sum(2)
        return values[np.argmin(distance, axis=1)]

    def gradients(self, values: Float[np.ndarray, " points"]) -> Float[np.ndarray, "points 2"]:
        """Gradients that minimise the integral of squared second derivatives along all edges.

        The cubic along an edge e with end values f and end slopes g.e bends with energy
        proportional to (4 p^2 + 4 p q + 4 q^2 - 12 (f2 - f1)(p + q)) / |e|^3, p = g1.e, q = g2.e.
        """
        count = len(self.points)
        scale = np.ptp(self.points, axis=0).max()
        points = self.points / scale  # one factor for both axes: conditioning only
        one, two = self._edges.T
        edge = points[two] - points[one]
        weight = np.linalg.norm(edge, axis=1) ** -3
        outer = edge[:, :, None] * edge[:, None, :] * weight[:, None, None]
        pull = 6 * (values[two] - values[one])[:, None] * edge * weight[:, None]
        matrix = np.zeros((count, count, 2, 2))
        right = np.zeros((count, 2))
        for a, b in ((one, two), (two, one)):
            np.add.at(matrix, (a, a), 4 * outer)
            np.add.at(matrix, (a, b), 2 * outer)
            np.add.at(right, a, pull)
        flat = matrix.transpose(0, 2, 1, 3).reshape(2 * count, 2 * count)
        return np.linalg.solve(flat, right.ravel()).reshape(count, 2) / scale

    def one_sweep_gradients(
        self, values: Float[np.ndarray, " points"]
    ) -> Float[np.ndarray, "points 2"]:
        """The same minimisation stopped after one Gauss-Seidel sweep from zero, in point order.

        A common library solves it by such sweeps with an absolute tolerance of 1e-6. Slopes of a
        loss per character are 1e-9, so on the published sweep it stops at once, and the published
        densification is this, not the minimum.
        """
        gradients = np.zeros((len(self.points), 2))
        starts, others = self._edges.T
        for point in range(len(self.points)):
            ends = np.concatenate([others[starts == point], starts[others == point]])
            edge = self.points[ends] - self.points[point]
            weight = np.linalg.norm(edge, axis=1) ** -3
            matrix = 4 * (edge * weight[:, None]).T @ edge
            pull = 6 * (values[ends] - values[point]) - 2 * np.sum(edge * gradients[ends], axis=1)
            right = edge.T @ (weight * pull)
            # All neighbours may lie on one line; then the slope across it stays 0.
            singular = np.linalg.det(matrix) <= 1e-12 * np.trace(matrix) ** 2
            solve = _least_norm if singular else np.linalg.solve
            gradients[point] = solve(matrix, right)
        return gradients

    def cubic(
        self,
        values: Float[np.ndarray, " points"],
        at: Float[np.ndarray, "queries 2"],
        gradients: Float[np.ndarray, "points 2"],
    ) -> Float[np.ndarray, " queries"]:
        values = np.asarray(values, np.float64)
        triangle, weights = self.locate(at)
        inside = np.flatnonzero(triangle >= 0)
        found = np.full(len(at), np.nan)
        if inside.size:
            found[inside] = self._clough_tocher(
                values, gradients, triangle[inside], weights[inside]
            )
        return found

    def _clough_tocher(self, values, gradients, triangle, weights):
        corners = self.triangles[triangle]
        f, g, p = values[corners], gradients[corners], self.points[corners]

        def towards(i, j):
            """Bezier ordinate next to corner i on the edge to j."""
            return f[:, i] + np.sum(g[:, i] * (p[:, j] - p[:, i]), axis=1) / 3

        edge = {(i, j): towards(i, j) for i in range(3) for j in range(3) if i != j}
        # Ordinates one step from each corner towards the centroid.
        inner = [(f[:, i] + edge[i, (i + 1) % 3] + edge[i, (i + 2) % 3]) / 3 for i in range(3)]
        side = []  # side[i]: the ordinate that decides the cross derivative on the edge opposite i
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            slant = self._slant(triangle, i, j, k)
            third = f[:, k] - f[:, j] + 3 * (edge[j, k] - edge[k, j])
            second = -f[:, j] + 2 * edge[j, k] - edge[k, j] + inner[j] + inner[k]
            side.append((slant * third + second) / 2)
        near = [(side[(i + 1) % 3] + side[(i + 2) % 3] + inner[i]) / 3 for i in range(3)]
        centre = sum(near) / 3

        smallest = weights.min(1)
        b = (weights - smallest[:, None]).T  # coordinates in the subtriangle: two corners
        c = 3 * smallest  # and the centroid
        total = c**3 * centre
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            total = total + b[i] ** 3 * f[:, i] + 3 * b[i] ** 2 * c * inner[i]
            total = total + 3 * b[i] ** 2 * (b[j] * edge[i, j] + b[k] * edge[i, k])
            total = total + 3 * b[i] * c**2 * near[i] + 6 * b[j] * b[k] * c * side[i]
        return total

    def _slant(self, triangle, i, j, k):
        """Coefficient of the third difference along edge (j, k) for a cross derivative that is
        linear in the direction to the neighbour's centroid; -1/2 on the hull."""
        neighbour = self._neighbours[triangle, j]  # matplotlib: edge number j runs from j to j + 1
        inside = np.flatnonzero(neighbour >= 0)
        slant = np.full(len(triangle), -0.5)
        if inside.size:
            centroid = self.points[self.triangles[neighbour[inside]]].mean(1)
            c = self._barycentric(triangle[inside], centroid)
            slant[inside] = (2 * c[:, k] + c[:, j] - 1) / (2 - 3 * c[:, k] - 3 * c[:, j])
        return slant


def _least_norm(matrix, right):
    return np.linalg.lstsq(matrix, right, rcond=1e-9)[0]


def quadratic_spline(
    x: Float[np.ndarray, " points"],
    y: Float[np.ndarray, " points"],
    at: Float[np.ndarray, " queries"],
) -> Float[np.ndarray, " queries"]:
    """Piecewise quadratic, C1, through all points; knots midway between them, without the two ends.

    With fewer than three points it is the polynomial through them.
    """
    x, at = np.asarray(x, np.float64), np.asarray(at, np.float64)
    low, span = x.min(), np.ptp(x)
    x, at = (x - low) / span, (at - low) / span
    knots = ((x[1:] + x[:-1]) / 2)[1:-1]

    def basis(points):
        powers = [points**k for k in range(min(3, len(x)))]
        return np.stack([*powers, *(np.maximum(points - knot, 0) ** 2 for knot in knots)], axis=1)

    return basis(at) @ np.linalg.solve(basis(x), y)
