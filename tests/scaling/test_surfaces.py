"""Surfaces between scattered points: what they reproduce, and what they refuse."""

import numpy as np
import pytest
from scipy.interpolate import interp1d

from lminf.errors import InputError
from lminf.scaling.surfaces import Surface, quadratic_spline


@pytest.fixture(name="cloud")
def _cloud():
    random = np.random.default_rng(0)
    points = random.random((60, 2)) * [1, 5]
    return points, np.sin(3 * points[:, 0]) + points[:, 1] ** 2, random.random((300, 2)) * [1, 5]


def test_the_cubic_surface_of_a_plane_is_the_plane(cloud):
    points, _, at = cloud
    plane = 3 * points[:, 0] - 2 * points[:, 1] + 1
    found = Surface(points, plane).cubic(at, converged=True)
    inside = np.isfinite(found)
    assert inside.sum() > 100
    np.testing.assert_allclose(found[inside], (3 * at[:, 0] - 2 * at[:, 1] + 1)[inside], atol=1e-8)


def test_surfaces_return_their_own_points(cloud):
    points, values, _ = cloud
    surface = Surface(points, values)
    np.testing.assert_allclose(surface.cubic(points, converged=True), values, atol=1e-9)
    np.testing.assert_allclose(surface.linear(points), values, atol=1e-9)


def test_repeated_points_count_once_with_their_mean(cloud):
    points, values, at = cloud
    twice = Surface(np.repeat(points, 2, axis=0), np.repeat(values, 2) + np.tile([-1, 1], 60))
    once = Surface(points, values)
    np.testing.assert_allclose(twice.linear(at), once.linear(at), atol=1e-9)
    x, y = np.array([1.0, 2, 2, 3, 4]), np.array([1.0, 3, 5, 9, 16])
    assert quadratic_spline(x, y, np.array([2.0]))[0] == pytest.approx(4)


def test_quadratic_spline_equals_scipy():
    random = np.random.default_rng(1)
    x, y = np.sort(random.random(10)), random.random(10)
    at = random.uniform(x[0], x[-1], 30)
    np.testing.assert_allclose(
        quadratic_spline(x, y, at), interp1d(x, y, "quadratic")(at), atol=1e-9
    )


def test_points_on_a_line_are_refused():
    with pytest.raises(InputError, match="on one line"):
        Surface(np.array([[0, 0], [1, 1], [2, 2.0]]), np.arange(3.0))
