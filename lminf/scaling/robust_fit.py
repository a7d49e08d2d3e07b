"""Batched float64 fits of sum_i w_i Huber(residual_i): many starts times many draws, in JAX.

With a Huber threshold of 1e-3 nearly every residual is on the linear branch, so the optimum is
that of a median regression: flat, and with corners. Optimisers with numerical gradients stop
early there and return other exponents. Here, for every draw:

explore   Gauss-Newton on reweighted squares with damping; a wide threshold is smooth and finds the
          basins. All starts take a few steps, the best SURVIVORS take the rest.
polish    the best `keep` of those, then the best of all: steps with H + m M, the exact Hessian H
          regularised by the reweighted one M (which always descends), while the threshold falls to
          its value; monotone in the objective.
accept    a draw has converged when the projected gradient is GRADIENT_TOLERANCE of its own scale
          (the same sum with absolute values, and RESIDUAL_FLOOR more in each: at a perfect fit the
          residuals are rounding errors, whose sum never is small beside itself). Everything else
          is reported as not converged.

Of more than EXPLORED_ROWS rows the basins are looked for on a sample of that many; the polish and
the acceptance are of all rows.

Only this module switches to 64 bits, and only inside its calls: float32 does not reproduce the
published constants.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lminf.errors import InputError

Numbers = Array | np.ndarray
Columns = Mapping[str, Numbers]  # [rows], or [draws, rows]
Residual = Callable[[Numbers, Columns], Array]  # (parameters, columns) -> [rows]

# Told how many fits of a stage are done, and of how many; commands show it.
OBSERVER: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("observer", default=None)

THRESHOLD = 1e-3  # of Huber, as in every published fit
LEVELS = 6  # thresholds in one call of the explorer
FIRST_THRESHOLDS = (0.1,) * LEVELS  # every start
SURVIVORS = 48
SECOND_THRESHOLDS = (0.1,) * 4 + (0.02,) * 4 + (0.005,) * 4
POLISH_THRESHOLDS = (0.02, 0.005)  # then THRESHOLD
ROUGH_STEPS, FINE_STEPS = 8, 150  # Newton steps; fine ones end by themselves after 5 to 40
MIXES = (0.0, 0.01, 0.1, 0.5, 2.0)  # m in H + m M, tried together: an objective is cheaper than H
GRADIENT_TOLERANCE = 1e-6
RANK_TOLERANCE = 1e-7  # of the Jacobian with columns of length one
RESIDUAL_FLOOR = 1e-7  # residuals of logarithms and losses: 1e-4 of the threshold
EXPLORED_ROWS = 2048
DECREASE_TOLERANCE = 1e-10  # of the objective
# Lanes (start, draw) and rows are filled up to fixed sizes, so that two programs serve every fit
# of a law; compiling them takes longer than most fits. Few lanes in the polisher: all of a call
# wait for its slowest.
EXPLORE_LANES, POLISH_LANES = 64, 16
ROW_MULTIPLE = 128


class Solutions(NamedTuple):
    """One optimum per draw."""

    parameters: Float[np.ndarray, "draws parameters"]
    objective: Float[np.ndarray, " draws"]  # sum of Huber
    converged: np.ndarray  # [draws] bool
    bound: np.ndarray  # [draws, parameters] -1 on the lower bound, 1 on the upper, else 0
    gradient: Float[np.ndarray, " draws"]  # projected gradient over its own scale
    free: np.ndarray  # [draws, parameters] bool: not fixed


def huber(residual: Numbers, threshold: float | Array) -> Array:
    """The penalty of every residual: quadratic up to the threshold, linear beyond."""
    size = jnp.abs(residual)
    return jnp.where(
        size <= threshold, 0.5 * residual * residual, threshold * (size - 0.5 * threshold)
    )


def objective(
    residual: Residual, theta: Numbers, columns: Columns, weights: Any, level: Any
) -> Array:
    """Weighted sum of Huber(residual) with threshold `level`; traceable."""
    return jnp.sum(weights * huber(residual(theta, columns), level))


def minimise(
    residual: Residual,
    columns: Columns,
    *,
    starts: Float[np.ndarray, "starts parameters"],
    lower: Float[np.ndarray, " parameters"] | Float[np.ndarray, "draws parameters"],
    upper: Float[np.ndarray, " parameters"] | Float[np.ndarray, "draws parameters"],
    weights: Float[np.ndarray, "draws rows"] | None = None,
    keep: int = 8,
) -> Solutions:
    """Global minimum over the starts for every draw; without weights of every row once. `lower ==
    upper` fixes a parameter. Columns are [rows], shared by all draws, or [draws, rows].
    """
    rows = np.shape(next(iter(columns.values())))[-1]
    weights = np.ones((1, rows)) if weights is None else np.asarray(weights, np.float64)
    lanes = few = _Lanes(residual, columns, weights, lower, upper)
    draws, count = len(weights), len(starts)
    if rows > EXPLORED_ROWS:
        explored = np.sort(np.random.default_rng(0).permutation(rows)[:EXPLORED_ROWS])
        part = {name: np.asarray(column)[..., explored] for name, column in columns.items()}
        few = _Lanes(residual, part, weights[:, explored], lower, upper)
    with jax.enable_x64(True):
        theta = np.broadcast_to(np.asarray(starts, np.float64), (draws, *starts.shape))
        theta = np.clip(theta, lanes.lower[:, None], lanes.upper[:, None])
        theta = few.explore(theta, FIRST_THRESHOLDS)
        theta = few.best(theta, min(SURVIVORS, count))
        theta = few.best(few.explore(theta, SECOND_THRESHOLDS), min(keep, count))
        for level in (*POLISH_THRESHOLDS, THRESHOLD):
            theta = few.polish(theta, level, ROUGH_STEPS)
        theta = lanes.best(theta, 1)
        theta = lanes.polish(theta, THRESHOLD, FINE_STEPS)
        values, slope, decrease = (part[:, 0] for part in lanes.judge(theta))
    theta = theta[:, 0]
    small = (slope <= GRADIENT_TOLERANCE) | (decrease <= DECREASE_TOLERANCE * values)
    free = lanes.lower < lanes.upper
    bound = np.where(free & (theta >= lanes.upper), 1, 0)
    bound = np.where(free & (theta <= lanes.lower), -1, bound)
    return Solutions(theta, values, np.isfinite(values) & small, bound, slope, free)


def determined(
    what: str, names: Sequence[str], residual: Residual, columns: Columns, **options: Any
) -> Solutions:
    """What `minimise` gives; InputError unless the first draw converged and the rows tell its free
    parameters apart: none of them may move, alone or together, without moving a residual."""
    solutions = minimise(residual, columns, **options)
    theta = solutions.parameters[0]
    if not np.all(np.isfinite(theta)):
        raise InputError(f"{what}: the fit has no finite result; the table does not determine it")
    with jax.enable_x64(True):
        data = {name: np.asarray(column, np.float64) for name, column in columns.items()}
        jacobian = np.asarray(jax.jacfwd(residual)(theta, data))
    length = np.linalg.norm(jacobian, axis=0)
    free = np.flatnonzero(solutions.free[0] & (solutions.bound[0] == 0)).tolist()
    loose = [names[i] for i in free if length[i] < RANK_TOLERANCE * length.max()]
    if free and not loose:
        triangle = np.linalg.qr(jacobian[:, free] / length[free], mode="r")
        _, size, direction = np.linalg.svd(triangle, full_matrices=True)
        if len(size) < len(free) or size[-1] <= RANK_TOLERANCE * size[0]:
            loose = [
                names[i] for i, part in zip(free, direction[-1], strict=True) if abs(part) > 0.1
            ]
    if loose:
        raise InputError(
            f"{what}: the table does not determine {', '.join(loose)}: other values of them fit it "
            "as well; add rows with other values of what they belong to (three of each at least)"
        )
    if not solutions.converged[0]:
        raise InputError(
            f"{what}: the fit did not converge (projected gradient {solutions.gradient[0]:.1e} of "
            "its scale), so there is no result; the table does not determine this law"
        )
    return solutions


class _Lanes:
    """The batch as flat lanes of fixed size: lane = (draw, candidate)."""

    def __init__(self, residual, columns, weights, lower, upper):
        draws, rows = weights.shape
        spare = -rows % ROW_MULTIPLE  # repeats of the last row with weight 0
        self.residual = residual
        self.weights = np.pad(weights, ((0, 0), (0, spare)))
        self.shared, self.per_draw = {}, {}
        for name, column in columns.items():
            column = np.asarray(column, np.float64)
            padding = ((0, 0),) * (column.ndim - 1) + ((0, spare),)
            target = self.shared if column.ndim == 1 else self.per_draw
            target[name] = np.pad(column, padding, mode="edge")
        shape = (draws, np.shape(lower)[-1])
        self.lower = np.broadcast_to(np.asarray(lower, np.float64), shape)
        self.upper = np.broadcast_to(np.asarray(upper, np.float64), shape)

    def _map(self, program, theta, *extra):
        """`program` over all lanes of theta [draws, candidates, parameters], in fixed chunks."""
        draws, count = theta.shape[:2]
        flat = theta.reshape(draws * count, -1)
        draw = np.repeat(np.arange(draws), count)
        exploring = program is _explore
        size, stage = (EXPLORE_LANES, "exploring") if exploring else (POLISH_LANES, "polishing")
        observer = OBSERVER.get()
        pieces = []
        for begin in range(0, len(flat), size):
            index = np.minimum(np.arange(begin, begin + size), len(flat) - 1)
            of = draw[index]
            per_draw = {name: column[of] for name, column in self.per_draw.items()}
            data = (flat[index], self.shared, per_draw, self.weights[of])
            box = (self.lower[of], self.upper[of])
            piece = _run_lanes(program, self.residual, *data, *box, *extra)
            used = min(size, len(flat) - begin)
            if observer is not None:
                observer(stage, begin + used, len(flat))
            pieces.append([np.asarray(part)[:used] for part in piece])
        return [
            np.concatenate(part).reshape(draws, count, *part[0].shape[1:])
            for part in zip(*pieces, strict=True)
        ]

    def explore(self, theta: Any, thresholds: Any) -> Any:
        """The lanes after a step at every threshold."""
        for begin in range(0, len(thresholds), LEVELS):
            levels = np.asarray(thresholds[begin : begin + LEVELS], np.float64)
            (theta,) = self._map(_explore, theta, levels)
        return theta

    def polish(self, theta: Any, level: Any, steps: int) -> Any:
        return self._map(_polish, theta, np.float64(level), np.int64(steps))[0]

    def judge(self, theta: Any) -> Any:
        """Objective, relative gradient and predicted decrease of each lane."""
        return self._map(_polish, theta, np.float64(THRESHOLD), np.int64(0))[1:]

    def best(self, theta: Any, count: int) -> Any:
        """The `count` lanes of least objective of every draw."""
        values = self.judge(theta)[0]
        order = np.argsort(np.where(np.isfinite(values), values, np.inf), axis=1, kind="stable")
        return np.take_along_axis(theta, order[:, :count, None], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_lanes(program, residual, theta, shared, per_draw, weights, lower, upper, *extra):
    def lane(theta, per_draw, weight, low, high):
        return program(residual, theta, {**shared, **per_draw}, weight, low, high, *extra)

    return jax.vmap(lane)(theta, per_draw, weights, lower, upper)


def _fixed(theta, slope, low, high):
    """Parameters that cannot move: fixed, or on a bound with the slope pointing outwards."""
    return (low >= high) | ((theta <= low) & (slope > 0)) | ((theta >= high) & (slope < 0))


def _step(matrix, slope, fixed):
    """Newton step of the free parameters; at most 2 in each: they are logarithms or exponents."""
    free = jnp.where(fixed, 0.0, 1.0)
    matrix = matrix * free[:, None] * free[None, :] + jnp.diag(jnp.where(fixed, 1.0, 0.0))
    step = -jnp.linalg.solve(matrix, slope * free)
    return jnp.clip(jnp.where(jnp.isfinite(step), step, 0.0), -2.0, 2.0)


def _damping(matrix, amount):
    diagonal = jnp.abs(jnp.diagonal(matrix))
    return jnp.diag(amount * diagonal + 1e-13 * jnp.max(diagonal) + 1e-300)


def _explore(residual, theta, data, weight, low, high, levels):
    def body(carry, level):
        theta, damping = carry
        r = residual(theta, data)
        jacobian = jax.jacfwd(residual)(theta, data)
        robust = weight * jnp.minimum(1.0, level / jnp.maximum(jnp.abs(r), 1e-300))
        slope = jacobian.T @ (robust * r)
        curvature = (jacobian * robust[:, None]).T @ jacobian
        fixed = _fixed(theta, slope, low, high)
        step = _step(curvature + _damping(curvature, damping), slope, fixed)
        new = jnp.clip(theta + step, low, high)
        objective_before = jnp.sum(weight * huber(r, level))
        better = objective(residual, new, data, weight, level) < objective_before
        theta = jnp.where(better, new, theta)
        return (theta, jnp.clip(jnp.where(better, damping * 0.2, damping * 5), 1e-9, 1e9)), None

    start = (theta, jnp.asarray(1e-2, theta.dtype))
    return (jax.lax.scan(body, start, jnp.asarray(levels, theta.dtype))[0][0],)


def _polish(residual, theta, data, weight, low, high, level, steps):
    """Parameters, objective, relative projected gradient, predicted decrease after `steps`."""

    def measure(point):
        return objective(residual, point, data, weight, level)

    def local(theta):
        """Slope, reweighted curvature, fixed parameters, slope over its scale, decrease."""
        r = residual(theta, data)
        jacobian = jax.jacfwd(residual)(theta, data)
        influence = weight * jnp.clip(r, -level, level)
        slope = jacobian.T @ influence
        robust = weight * jnp.minimum(1.0, level / jnp.maximum(jnp.abs(r), 1e-300))
        majorant = (jacobian * robust[:, None]).T @ jacobian
        fixed = _fixed(theta, slope, low, high)
        scale = jnp.abs(jacobian).T @ (jnp.abs(influence) + weight * RESIDUAL_FLOOR) + 1e-300
        relative = jnp.max(jnp.where(fixed, 0.0, jnp.abs(slope) / scale))
        step = _step(majorant + _damping(majorant, 1e-9), slope, fixed)
        return slope, majorant, fixed, relative, -jnp.dot(jnp.where(fixed, 0.0, slope), step)

    def body(carry):
        theta, value, damping, count, failures, (slope, majorant, fixed, _, _) = carry
        exact = jax.hessian(measure)(theta)

        def attempt(mix):
            matrix = exact + mix * majorant + _damping(majorant, damping)
            return jnp.clip(theta + _step(matrix, slope, fixed), low, high)

        tries = jax.vmap(attempt)(jnp.asarray(MIXES, theta.dtype))
        values = jax.vmap(measure)(tries)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        pick = jnp.argmin(values)
        better = values[pick] < value
        theta = jnp.where(better, tries[pick], theta)
        value = jnp.where(better, values[pick], value)
        damping = jnp.clip(jnp.where(better, damping * 0.1, damping * 30), 1e-9, 1e6)
        failures = jnp.where(better, 0, failures + 1)
        return theta, value, damping, count + 1, failures, local(theta)

    def unfinished(carry):
        _, value, _, count, failures, (_, _, _, relative, decrease) = carry
        finished = (relative <= 1e-2 * GRADIENT_TOLERANCE) | (
            decrease <= 1e-2 * DECREASE_TOLERANCE * value
        )
        return (count < steps) & (failures < 5) & ~finished

    start = (theta, measure(theta), jnp.asarray(1e-6, theta.dtype), 0, 0, local(theta))
    theta, value, _, _, _, (_, _, _, relative, decrease) = jax.lax.while_loop(
        unfinished, body, start
    )
    return theta, value, relative, decrease
