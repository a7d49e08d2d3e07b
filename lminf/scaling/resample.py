"""Resampling as integer weights: a draw is a weight per row, so every draw shares one design.

Rows of a run (checkpoints) and of a group (one grid) share noise; resampling rows as if they were
independent gives intervals that are too narrow. Both are offered, the cluster one is the default.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lminf.errors import InputError


@dataclass(frozen=True)
class Resampling:
    """How a fit is repeated: `draws` times, of whole clusters drawn with replacement."""

    draws: int  # 0: no interval
    cluster: str | None  # one of the table's CLUSTERS, or "row"; None: the first of them
    seed: int

    def cluster_of(self, table: Any) -> str:
        """The column of the table whose ids are the clusters, or "row"."""
        valid = (*table.CLUSTERS, "row")
        if self.cluster not in (None, *valid):
            raise InputError(
                f"cluster={self.cluster!r} is unknown for a {type(table).__name__}; use "
                f"{', '.join(valid)}"
            )
        return self.cluster or valid[0]

    def weights(self, table: Any) -> Float[np.ndarray, "draws rows"]:
        """How often each row of the table appears in each draw."""
        name = self.cluster_of(table)
        ids = np.arange(len(table)) if name == "row" else getattr(table, name)
        return bootstrap_weights(ids, draws=self.draws, seed=self.seed)

    def described(self, table: Any) -> str:
        """The method as an interval names it."""
        return f"{self.draws} bootstrap draws over {self.cluster_of(table)}s"


def bootstrap_weights(
    cluster: Int[np.ndarray, " rows"], *, draws: int, seed: int
) -> Float[np.ndarray, "draws rows"]:
    """How often each row appears when whole clusters are drawn with replacement."""
    ids, member = np.unique(cluster, return_inverse=True)
    if ids.size < 2:
        raise InputError(
            "a bootstrap needs at least two clusters and found one; resample rows or add runs"
        )
    random = np.random.default_rng(seed)
    counts = random.multinomial(ids.size, np.full(ids.size, 1 / ids.size), size=draws)
    return counts[:, member.ravel()].astype(np.float64)


def percentile_interval(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """The 95 % interval of resampled values, of which some may be infinite."""
    values = np.asarray(values, np.float64)
    # Between a finite and an infinite value there is nothing to interpolate.
    rule = "linear" if np.all(np.isfinite(values)) else "inverted_cdf"
    low, high = np.percentile(values, [2.5, 97.5], method=rule)
    return float(low), float(high)


def jackknife_interval(
    point: float, left_out: Float[np.ndarray, " clusters"]
) -> tuple[float, float]:
    """Normal 95 % interval from the delete-one-cluster estimates; wide when clusters are few."""
    left_out = np.asarray(left_out, np.float64)
    count = left_out.size
    error = np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2))
    width = statistics.NormalDist().inv_cdf(0.975) * error
    return float(point - width), float(point + width)
