"""Surfaces between scattered points against SciPy."""

import numpy as np
import pytest
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator, interp1d

from lminf.errors import InputError
from lminf.scaling.surfaces import Surface, quadratic_spline


@pytest.fixture(name="cloud")
def _cloud():
    random = np.random.default_rng(0)
    points = random.random((60, 2)) * [1, 5]
    return points, np.sin(3 * points[:, 0]) + points[:, 1] ** 2, random.random((300, 2)) * [1, 5]


def test_linear_surface_equals_scipy(cloud):
    points, values, at = cloud
    expected = LinearNDInterpolator(points, values)(at)
    np.testing.assert_allclose(Surface(points).linear(values, at), expected, atol=1e-12)


def test_cubic_surface_equals_scipy_where_that_converges(cloud):
    points, values, at = cloud
    surface = Surface(points)
    peer = CloughTocher2DInterpolator(points, values, tol=1e-13, maxiter=100_000)
    found = surface.cubic(values, at, surface.gradients(values))
    np.testing.assert_allclose(found, peer(at), atol=1e-11)


def test_one_sweep_equals_scipy_where_that_stops_at_once(cloud):
    points, values, at = cloud
    surface, scale = Surface(points * 1e9), 1e9  # slopes of 1e-9 are below its absolute tolerance
    peer = CloughTocher2DInterpolator(points * scale, values)
    found = surface.cubic(values, at * scale, surface.one_sweep_gradients(values))
    np.testing.assert_allclose(found, peer(at * scale), atol=1e-10)


def test_cubic_surface_returns_its_own_points(cloud):
    points, values, _ = cloud
    surface = Surface(points)
    found = surface.cubic(values, points, surface.gradients(values))
    np.testing.assert_allclose(found, values, atol=1e-9)


def test_quadratic_spline_equals_scipy():
    random = np.random.default_rng(1)
    x, y = np.sort(random.random(10)), random.random(10)
    at = random.uniform(x[0], x[-1], 30)
    np.testing.assert_allclose(
        quadratic_spline(x, y, at), interp1d(x, y, "quadratic")(at), atol=1e-9
    )


def test_points_on_a_line_are_refused():
    with pytest.raises(InputError, match="on one line"):
        Surface(np.array([[0, 0], [1, 1], [2, 2.0]]))
