"""The question all three vocabulary laws answer: which V at which budget, and how sure.

N_nv and N_v in raw parameters, D in raw tokens, F in raw FLOPs = 6 (N_nv + N_v) D.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import accounting, resample
from lminf.scaling import fertility as fertilities
from lminf.scaling.fertility import Fertility
from lminf.scaling.laws import Interval, Law

Constants = Mapping[str, Float[np.ndarray, " draws"]]
SMALLEST_VOCAB = 64.0


@dataclass(frozen=True)
class Optimum:
    """The loss-optimal vocabulary of one query."""

    vocab_size: float
    n_v: float
    n_nv: float
    width: float
    flops: float
    tokens: float
    characters: float
    head_share: float  # of the training FLOPs: N_v / (N_nv + N_v)
    warnings: tuple[str, ...]

    def rounded(self, multiple: int) -> int:
        return accounting.round_up(self.vocab_size, multiple)


@dataclass(frozen=True, kw_only=True)
class VocabLaw(Law):
    """Common to the three approaches; each says how N_v follows from its constants."""

    def n_v(
        self, constants: Constants, *, n_nv: float, width: float, flops
    ) -> Float[np.ndarray, " draws"]:
        """Optimal N_v for each draw of the constants; NaN where there is none."""
        raise NotImplementedError

    def budget(self, constants: Constants, n_nv: float) -> Float[np.ndarray, " draws"]:
        """Compute-optimal FLOPs of N_nv: the envelope's (N_nv / k)^(1 / alpha)."""
        return np.exp((np.log(n_nv) - constants["ln_k_nnv"]) / constants["alpha_nnv"])

    @property
    def fertility(self) -> Fertility:
        return fertilities.from_json(self.procedure["fertility"])

    def _solve(self, constants: Constants, n_nv, width, flops, tokens):
        """(N_v, flops) for each draw; a token budget is met at the optimum by iteration."""
        if tokens is None:
            used = self.budget(constants, n_nv) if flops is None else flops
            used = np.broadcast_to(np.asarray(used, float), np.shape(constants["ln_k_nnv"]))
            return self.n_v(constants, n_nv=n_nv, width=width, flops=used), used
        used = np.full(np.shape(constants["ln_k_nnv"]), 6 * 1.05 * n_nv * tokens)
        n_v = used
        for _ in range(60):  # N_v ~ F^0.4 and N_v < N_nv: contracts by 5 or more each time
            n_v = self.n_v(constants, n_nv=n_nv, width=width, flops=used)
            new = 6 * (n_nv + n_v) * tokens
            if np.nanmax(np.abs(new / used - 1), initial=0) < 1e-12:
                break
            used = new
        return n_v, used

    def _point(self) -> Constants:
        return {name: np.array([value]) for name, value in self.constants.items()}

    def optimum(
        self,
        *,
        n_nv: float,
        d: float | None = None,
        flops: float | None = None,
        tokens: float | None = None,
    ) -> Optimum:
        """Optimal vocabulary. Width `d` from the published ladder and FLOPs compute-optimal if
        not given; `tokens` instead of `flops` fixes the training tokens at the optimum."""
        n_nv, width = self._checked(n_nv, d, flops, tokens)
        n_v, used = (float(x[0]) for x in self._solve(self._point(), n_nv, width, flops, tokens))
        if not np.isfinite(n_v):
            raise InputError(
                f"{self.version}: no loss-optimal vocabulary exists between {SMALLEST_VOCAB:g} and "
                f"{self.fertility.cap:g} at N_nv={n_nv:g}, F={used:.3g}"
            )
        vocab = n_v / width
        seen = used / (6 * (n_nv + n_v))
        notes = [*self.warnings, *self.outside({"n_nv": n_nv, "flops": used, "vocab": vocab})]
        per_character = float(self.fertility.tokens_per_character(vocab))
        return Optimum(
            vocab, n_v, n_nv, width, used, seen, seen / per_character, n_v / (n_nv + n_v),
            tuple(notes),
        )  # fmt: skip

    def optimum_draws(
        self, *, n_nv, d=None, flops=None, tokens=None
    ) -> Float[np.ndarray, " draws"]:
        """Optimal V under each draw of the constants (NaN: that draw has none)."""
        n_nv, width = self._checked(n_nv, d, flops, tokens)
        constants = {
            name: np.asarray(self.draws.get(name, value), float)
            for name, value in self.constants.items()
        }
        count = max(np.size(value) for value in constants.values())
        constants = {name: np.broadcast_to(value, (count,)) for name, value in constants.items()}
        return self._solve(constants, n_nv, width, flops, tokens)[0] / width

    def interval(self, *, n_nv, d=None, flops=None, tokens=None, level: float = 0.95) -> Interval:
        """Percentile interval of the optimal V over the law's draws."""
        if not self.draws:
            reason = self.procedure.get("no_draws", "fit with draws > 0")
            raise InputError(f"{self.version} carries no draws, so no interval: {reason}")
        sizes = self.optimum_draws(n_nv=n_nv, d=d, flops=flops, tokens=tokens)
        none = ~np.isfinite(sizes)
        # A draw without optimum wants the smallest vocabulary: keep it as such.
        low, high = resample.percentile_interval(np.where(none, SMALLEST_VOCAB, sizes), level)
        note = f"; {none.sum()} of {none.size} draws have no optimum" if none.any() else ""
        return Interval(low, high, self.resampling + note)

    def _checked(self, n_nv, d, flops, tokens):
        if flops is not None and tokens is not None:
            raise InputError("flops and tokens were both given; a budget is one of them")
        if flops is not None:
            accounting.require_raw("flops", flops, "flops")
        if tokens is not None:
            accounting.require_raw("tokens", tokens, "tokens")
        n_nv = accounting.require_raw("n_nv", n_nv, "n_nv")
        width = accounting.ladder_width(n_nv) if d is None else d
        return n_nv, accounting.require_raw("d", float(width), "width")


def bisect(function, low, high, steps: int = 80):
    """Root of an increasing function per draw in [low, high]; NaN where its sign is constant."""
    low, high = np.array(low, float), np.array(high, float)
    valid = (function(low) < 0) & (function(high) > 0)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        below = function(middle) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(valid, 0.5 * (low + high), np.nan)
