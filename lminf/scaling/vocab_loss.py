"""Approach 3: a parametric loss in N_nv, N_v and data, and its minimum over V at a budget.

    L_u = -E + A1 N_nv^-beta + A2 N_v^-alpha2 + B D^-beta        N in 1e6, D in 1e9

The released fit divides V by 1000 before it turns characters into tokens, so its third covariate is
H f(V / 1000), about three times the tokens and with another dependence on V; its prediction step
then uses true tokens. At 70B that decides between 218K and 60K entries, so covariates have names:

    mode                    fitted on        optimum of
    reference               H f(V/1000)      true tokens      (as released)
    consistent-reference    H f(V/1000)      H f(V/1000)
    tokens                  true tokens      true tokens

`loss` always uses the covariate that was fitted: anything else is another function.
Source: arXiv:2407.13623, section 4.3 and released code.
"""

import itertools
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import engine, laws, resample, vocab, vocab_derivative, vocab_isoflop
from lminf.scaling.fertility import Fertility
from lminf.scaling.tables import VocabTable

MODES = ("reference", "consistent-reference", "tokens")
PARAMETERS = ("ln_A1", "ln_A2", "ln_B", "ln_E", "alpha2", "beta")
FLOPS_LIMIT = 2.18e17  # rows below it are dropped, as released
STARTS = np.array(
    list(itertools.product(*[(0, 2.5, 5)] * 3, (0, 2), (0, 0.5, 1), (0, 0.5, 1))),
    np.float64,
)  # fmt: skip
# "published": the range that the released code accepts. "wide": no bound that could matter.
BOUNDS = {
    "published": ([-20, -20, -20, -20, 0.1, 0.1], [60, 60, 60, 60, 1.0, 1.0]),
    "wide": ([-20, -20, -20, -20, -3.0, 0.0], [60, 60, 60, 60, 8.0, 3.0]),
}


def residual(theta, columns):
    """Predicted minus observed L_u; theta in the order of PARAMETERS."""
    a1, a2, b, e, alpha2, beta = theta
    size = jnp.exp(a1 - beta * columns["ln_n_nv"])
    head = jnp.exp(a2 - alpha2 * columns["ln_n_v"])
    data = jnp.exp(b - beta * columns["ln_data"])
    return size + head + data - jnp.exp(e) - columns["loss"]


def covariate(mode: str, *, characters, vocab_size, tokens, fertility: Fertility):
    """What the mode calls data: true tokens, or the released H f(V / 1000)."""
    if mode == "tokens":
        return tokens
    return characters * fertility.tokens_per_character(np.asarray(vocab_size) / 1000)


@dataclass(frozen=True, kw_only=True)
class LossLaw(vocab.VocabLaw):
    kind = "vocab-loss"

    @property
    def mode(self) -> str:
        return self.procedure["mode"]

    def loss(self, *, n_nv, n_v, characters, vocab_size, tokens) -> Float[np.ndarray, " rows"]:
        """L_u in nats per token, with the covariate the law was fitted on."""
        data = covariate(
            self.mode, characters=characters, vocab_size=vocab_size, tokens=tokens,
            fertility=self.fertility,
        )  # fmt: skip
        return self._loss(self.constants, n_nv, n_v, data)

    def table_loss(self, table: VocabTable) -> Float[np.ndarray, " rows"]:
        return self.loss(
            n_nv=table.n_nv, n_v=table.n_v, characters=table.characters,
            vocab_size=table.vocab_size, tokens=table.tokens,
        )  # fmt: skip

    @staticmethod
    def _loss(constants, n_nv, n_v, data):
        beta = constants["beta"]
        head = np.exp(constants["ln_A2"] - constants["alpha2"] * np.log(n_v / 1e6))
        rest = np.exp(constants["ln_A1"] - beta * np.log(n_nv / 1e6))
        seen = np.exp(constants["ln_B"] - beta * np.log(data / 1e9))
        return rest + head + seen - np.exp(constants["ln_E"])

    def loss_at_budget(self, *, n_nv, vocab_size, width, flops) -> Float[np.ndarray, "..."]:
        """L_u of a vocabulary at a budget, by the function whose minimum `optimum` returns."""
        return self._loss_at(self.constants, n_nv, np.asarray(vocab_size, float), width, flops)

    def _loss_at(self, constants, n_nv, size, width, flops):
        n_v = size * width
        tokens = flops / (6 * (n_nv + n_v))
        data = tokens
        if self.mode == "consistent-reference":
            small = self.fertility.tokens_per_character(size / 1000)
            data = tokens * small / self.fertility.tokens_per_character(size)
        return self._loss(constants, n_nv, n_v, data)

    def n_v(self, constants, *, n_nv, width, flops):
        if self.mode == "consistent-reference":
            return self._scan(constants, n_nv, width, flops)
        alpha2, beta = constants["alpha2"], constants["beta"]
        head = constants["ln_A2"] + np.log(np.maximum(alpha2, 1e-300))
        seen = constants["ln_B"] + np.log(np.maximum(beta, 1e-300)) + beta * np.log(6e15 / flops)

        def slope(ln_n_v):  # ln of the cost of a parameter minus ln of its gain, in 1e6
            total = np.log(n_nv / 1e6 + np.exp(ln_n_v))
            return seen + (beta - 1) * total - (head - (alpha2 + 1) * ln_n_v)

        low = np.full(np.shape(alpha2), np.log(vocab.SMALLEST_VOCAB * width / 1e6))
        high = np.full(np.shape(alpha2), np.log(1e7 * width / 1e6))
        sound = (alpha2 > 0) & (beta > 0) & (beta < 1)
        found = vocab.bisect(slope, low, high)
        found = np.where(slope(high) < 0, high, found)  # still falling at 1e7 entries: the largest
        return np.where(sound, np.exp(found) * 1e6, np.nan)

    def _scan(self, constants, n_nv, width, flops):
        """Minimum over ln V on a grid, then refined; H f(V / 1000) has no closed derivative."""
        names = ("ln_A1", "ln_A2", "ln_B", "ln_E", "alpha2", "beta")
        columns = {name: np.asarray(constants[name])[:, None] for name in names}
        low, high = np.log(2000.0), np.log(1e6)  # below 2000, V / 1000 leaves every tokenizer
        centre, span = np.full(np.shape(flops), (low + high) / 2), (high - low) / 2
        for _ in range(8):
            grid = np.clip(centre[:, None] + np.linspace(-span, span, 101), low, high)
            loss = self._loss_at(columns, n_nv, np.exp(grid), width, np.asarray(flops)[:, None])
            centre = np.take_along_axis(grid, loss.argmin(1)[:, None], axis=1)[:, 0]
            span /= 20
        return np.where(centre <= low + 1e-9, np.nan, np.exp(centre) * width)

    def optimum(self, *, n_nv, d=None, flops=None, tokens=None):
        if self.constants["alpha2"] <= 0:
            raise InputError(
                f"{self.version}: alpha2 is not identified (the fit turns it negative, "
                f"{self.constants['alpha2']:.3g}), so this law has no optimal vocabulary; fit with "
                "bounds or use another approach"
            )
        return super().optimum(n_nv=n_nv, d=d, flops=flops, tokens=tokens)


@dataclass(frozen=True)
class VocabLaw3:
    """Procedure of approach 3: 486 starts, Huber 1e-3 on L_u, all draws at once."""

    mode: str = "tokens"
    bounds: str = "published"
    # Rows with fewer FLOPs are dropped; None: the released limit, or no row where none reaches it.
    flops_limit: Annotated[float, Range(min=0)] | None = None

    def __post_init__(self):
        ranges.check(self)
        for name, value, valid in (("mode", self.mode, MODES), ("bounds", self.bounds, BOUNDS)):
            if value not in valid:
                raise InputError(
                    f"approach 3: {name}={value!r} is unknown; use one of {', '.join(valid)}"
                )

    def columns(self, table: VocabTable, fertility: Fertility) -> dict[str, np.ndarray]:
        data = covariate(
            self.mode, characters=table.characters, vocab_size=table.vocab_size,
            tokens=table.tokens, fertility=fertility,
        )  # fmt: skip
        return {
            "ln_n_nv": np.log(table.n_nv / 1e6),
            "ln_n_v": np.log(table.n_v / 1e6),
            "ln_data": np.log(data / 1e9),
            "loss": table.loss,
        }

    def limit(self, table: VocabTable) -> float:
        """FLOPs of the smallest row that is fitted."""
        if self.flops_limit is not None:
            return self.flops_limit
        return FLOPS_LIMIT if table.flops.max() >= FLOPS_LIMIT else 0.0

    def used(self, table: VocabTable) -> VocabTable:
        limit = self.limit(table)
        kept = table.select(table.flops >= limit)
        if len(kept) < 2 * len(PARAMETERS):
            raise InputError(
                f"only {len(kept)} of {len(table)} rows have FLOPs >= {limit:g}; "
                "approach 3 has six parameters, so lower --flops-limit or add rows"
            )
        laws.require_spread(kept.n_nv, "Non_vocab_parameters")
        laws.require_spread(kept.vocab_size, "vocab_size")
        laws.require_spread(kept.tokens, "training tokens")
        laws.require_spread(kept.loss, "loss", minimum=1)
        return kept

    def fit(
        self,
        table: VocabTable,
        *,
        fertility: Fertility,
        draws: int = 300,
        cluster: str = "run",
        seed: int = 0,
    ) -> LossLaw:
        kept = self.used(table)
        columns = self.columns(kept, fertility)
        lower, upper = (np.array(bound, float) for bound in BOUNDS[self.bounds])
        found = engine.minimise(
            residual, columns, starts=STARTS, lower=lower, upper=upper,
            weights=np.ones((1, len(kept))),
        )  # fmt: skip
        laws.require_determined("approach 3", PARAMETERS, residual, columns, found)
        if found.bound[0][1] < 0:
            raise InputError(
                "approach 3: no vocabulary of the table is too small for its runs (A2 is on its "
                "lower bound), so it determines no best one; train longer, or add smaller "
                "vocabularies"
            )
        constants = dict(zip(PARAMETERS, map(float, found.parameters[0]), strict=True))
        budget = {"ln_k_nnv": vocab_derivative.budget_constant(table, fertility), "alpha_nnv": 0.5}
        drawn, how, spans, notes = {}, "", {}, ()
        if draws:
            weights = resample.bootstrap_weights(
                vocab_isoflop.clusters(kept, cluster), draws=draws, seed=seed
            )
            starts = STARTS
            if len(kept) > engine.EXPLORED_ROWS:  # all of them took half of the time
                starts = np.concatenate([found.parameters, STARTS[::6]])
            sample = engine.minimise(
                residual, columns, starts=starts, lower=lower, upper=upper, weights=weights
            )
            named: dict[str, np.ndarray] = dict(zip(PARAMETERS, sample.parameters.T, strict=True))
            drawn, how, spans, notes = laws.draw_summary(
                named, sample.converged, f"{draws} bootstrap draws over {cluster}s"
            )
        notes = (*notes, *self._identification(constants, found.bound[0], spans, lower, upper))
        return LossLaw(
            version=f"loss-{self.mode}-{table.digest[:8]}",
            source=f"data sha256 {table.digest}",
            constants=constants | budget,
            units={"N_nv, N_v": "1e6 parameters", "D": "1e9 tokens", "L_u": "nats per token"},
            procedure={
                "approach": 3,
                "mode": self.mode,
                "bounds": self.bounds,
                "flops_limit": self.limit(table),
                "starts": len(STARTS),
                "fertility": fertility.to_json(),
            },
            fitted_range=vocab_isoflop.fitted_range(kept),
            draws=drawn,
            resampling=how,
            intervals=spans,
            warnings=notes,
            diagnostics={
                "rows": len(kept),
                "objective": float(found.objective[0]),
                "objective_is": "sum of Huber(1e-3) of L_u",
                "rmse": float(np.sqrt(np.mean(_residuals(columns, found.parameters[0]) ** 2))),
                "gradient": float(found.gradient[0]),
                "on_bound": [n for n, b in zip(PARAMETERS, found.bound[0], strict=True) if b],
            },
        )

    def _identification(self, constants, bound, spans, lower, upper) -> tuple[str, ...]:
        notes = []
        for index, name in enumerate(PARAMETERS):
            if bound[index]:
                edge = (upper if bound[index] > 0 else lower)[index]
                notes.append(f"{name} is not identified: the fit puts it on its bound {edge:g}")
        if constants["alpha2"] <= 0:
            notes.append(
                f"alpha2 is not identified: it turns negative ({constants['alpha2']:.2f}), so this "
                "form has no interior optimum on this table"
            )
        if "alpha2" in spans:
            low, high = spans["alpha2"]
            if low <= max(lower[4], 0.0) + 1e-9 or high >= upper[4] - 1e-9:
                notes.append(
                    f"alpha2 is not identified: its 95 % interval {low:.2f}..{high:.2f} reaches "
                    "zero or a bound"
                )
        return tuple(notes)


def _residuals(columns, theta):
    return np.asarray(residual(theta, columns))


def profile(
    procedure: VocabLaw3, table: VocabTable, *, fertility: Fertility, grid
) -> list[dict[str, float]]:
    """Rows (alpha2, objective, log-likelihood ratio) with all other parameters re-fitted.

    The ratio is 2 n ln(Q / Q_min) of Laplace errors with n the number of runs, not rows, since
    checkpoints of a run share noise; below 3.84 a value of alpha2 is inside the 95 % interval.
    """
    kept = procedure.used(table)
    grid = np.asarray(grid, float)
    lower, upper = (np.tile(np.array(b, float), (grid.size, 1)) for b in BOUNDS["wide"])
    lower[:, 4] = upper[:, 4] = grid
    found = engine.minimise(
        residual, procedure.columns(kept, fertility), starts=STARTS, lower=lower, upper=upper,
        weights=np.ones((grid.size, len(kept))),
    )  # fmt: skip
    runs = np.unique(kept.run).size
    if not found.converged.any():
        raise InputError(
            "no fit of the profile of alpha2 converged; the table does not determine it"
        )
    floor = 0.5 * len(kept) * engine.RESIDUAL_FLOOR**2  # at a perfect fit nothing is left
    value = np.where(found.converged, np.maximum(found.objective, floor), np.nan)
    ratio = 2 * runs * np.log(value / np.nanmin(value))
    return [
        {"alpha2": float(a), "objective": float(v), "likelihood_ratio": float(r)}
        for a, v, r in zip(grid, value, ratio, strict=True)
    ]
