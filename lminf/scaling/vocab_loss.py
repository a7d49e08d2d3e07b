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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from lminf import ranges
from lminf.errors import InputError
from lminf.ranges import Range
from lminf.scaling import laws, robust_fit, vocab, vocab_derivative
from lminf.scaling.fertility import Fertility
from lminf.scaling.resample import Resampling
from lminf.scaling.robust_fit import Columns, Numbers
from lminf.scaling.tables import VocabTable, require_spread
from lminf.scaling.vocab import Constants, Draws

MODES = ("reference", "consistent-reference", "tokens")
PARAMETERS = ("ln_A1", "ln_A2", "ln_B", "ln_E", "alpha2", "beta")
FLOPS_LIMIT = 2.18e17  # rows below it are dropped, as released
STARTS = np.array(
    list(itertools.product(*[(0, 2.5, 5)] * 3, (0, 2), (0, 0.5, 1), (0, 0.5, 1))),
    np.float64,
)  # fmt: skip
# Without bounds also from negative alpha2, with a term of V as small as the others: there true
# tokens have their least objective, and no optimum.
NEGATIVE = list(itertools.product((0, 2.5), (-12,), (0, 2.5), (0, 2), (-2,), (0.3, 0.6)))
STARTS_OF = {"published": STARTS, "wide": np.concatenate([STARTS, np.array(NEGATIVE, float)])}
# "published": the range that the released code accepts. "wide": no bound that could matter.
BOUNDS = {
    "published": ([-20, -20, -20, -20, 0.1, 0.1], [60, 60, 60, 60, 1.0, 1.0]),
    "wide": ([-20, -20, -20, -20, -3.0, 0.0], [60, 60, 60, 60, 8.0, 3.0]),
}


def residual(theta: Numbers, columns: Columns) -> Array:
    """Predicted minus observed L_u; theta in the order of PARAMETERS."""
    a1, a2, b, e, alpha2, beta = theta
    size = jnp.exp(a1 - beta * columns["ln_n_nv"])
    head = jnp.exp(a2 - alpha2 * columns["ln_n_v"])
    data = jnp.exp(b - beta * columns["ln_data"])
    return size + head + data - jnp.exp(e) - columns["loss"]


def covariate(mode: str, table: VocabTable, fertility: Fertility) -> Float[np.ndarray, " rows"]:
    """What the mode calls data: true tokens, or the released H f(V / 1000)."""
    if mode == "tokens":
        return table.tokens
    return table.characters * fertility.tokens_per_character(table.vocab_size / 1000)


@dataclass(frozen=True, kw_only=True)
class LossLaw(vocab.VocabLaw):
    """L_u by N_nv, N_v and data, and the V that makes it smallest at a budget."""

    kind = "vocab-loss"

    @property
    def mode(self) -> str:
        """Covariates of the fit and of the optimum, one of MODES."""
        return self.procedure["mode"]

    def loss(self, table: VocabTable) -> Float[np.ndarray, " rows"]:
        """L_u in nats per token of every row, with the covariate the law was fitted on."""
        data = covariate(self.mode, table, self.fertility)
        return loss_of(self.constants, table.n_nv, table.n_v, data)

    def loss_at_budget(
        self,
        *,
        n_nv: float,
        vocab_size: ArrayLike,
        width: float,
        flops: ArrayLike,
        constants: Constants | None = None,
    ) -> Float[np.ndarray, "..."]:
        """L_u of a vocabulary at a budget, by the function whose minimum `optimum` returns;
        of the law's constants or of others."""
        size = np.asarray(vocab_size, float)
        n_v = size * width
        data = np.asarray(flops, float) / (6 * (n_nv + n_v))
        if self.mode == "consistent-reference":
            small = self.fertility.tokens_per_character(size / 1000)
            data = data * small / self.fertility.tokens_per_character(size)
        return loss_of(constants or self.constants, n_nv, n_v, data)

    def n_v(self, constants: Constants, *, n_nv: float, width: float, flops: Draws) -> Draws:
        columns = {name: np.asarray(constants[name])[:, None] for name in PARAMETERS}
        low, high = np.log(vocab.SMALLEST_VOCAB), np.log(vocab.LARGEST_VOCAB)
        centre, span = np.full(np.shape(flops), (low + high) / 2), (high - low) / 2
        for _ in range(6):  # a grid, then finer ones: one search for the covariates of all modes
            grid = np.clip(centre[:, None] + np.linspace(-span, span, 101), low, high)
            loss = self.loss_at_budget(
                n_nv=n_nv, vocab_size=np.exp(grid), width=width, flops=flops[:, None],
                constants=columns,
            )  # fmt: skip
            centre = np.take_along_axis(grid, loss.argmin(1)[:, None], axis=1)[:, 0]
            span /= 25
        size = np.where(centre <= low + 1e-6, -np.inf, np.exp(centre) * width)
        return np.where(centre >= high - 1e-6, np.inf, size)

    def flops_lost(
        self, vocab_sizes: ArrayLike, *, n_nv: float, width: float, flops: float
    ) -> Float[np.ndarray, " sizes"]:
        """Share of the FLOPs that each vocabulary wastes: with the best one, the rest of them reach
        the same loss. At most 0.99."""
        shares = np.linspace(np.log(0.01), 0.0, 100)[:, None]
        sizes = np.geomspace(vocab.SMALLEST_VOCAB, vocab.LARGEST_VOCAB, 200)
        query: Any = {"n_nv": n_nv, "width": width}
        best = self.loss_at_budget(vocab_size=sizes, flops=flops * np.exp(shares), **query).min(1)
        reached = self.loss_at_budget(vocab_size=vocab_sizes, flops=flops, **query)
        return 1 - np.exp(np.interp(-np.asarray(reached), -best, shares[:, 0]))


def loss_of(
    constants: Mapping[str, Any], n_nv: ArrayLike, n_v: np.ndarray, data: np.ndarray
) -> Float[np.ndarray, "..."]:
    """L_u in nats per token for raw N_nv, N_v and data."""
    beta = constants["beta"]
    head = np.exp(constants["ln_A2"] - constants["alpha2"] * np.log(n_v / 1e6))
    blocks = np.exp(constants["ln_A1"] - beta * np.log(np.asarray(n_nv) / 1e6))
    data_term = np.exp(constants["ln_B"] - beta * np.log(data / 1e9))
    return blocks + head + data_term - np.exp(constants["ln_E"])


@dataclass(frozen=True)
class LossFit:
    """Procedure of approach 3: 486 starts, Huber 1e-3 on L_u, all draws at once."""

    mode: str = "tokens"
    bounds: str = "published"
    # Rows with fewer FLOPs are dropped; None: the released limit, or no row where none reaches it.
    flops_limit: Annotated[float, Range(min=0)] | None = None

    def __post_init__(self):
        ranges.check(self)
        laws.require_choice("mode", self.mode, MODES)
        laws.require_choice("bounds", self.bounds, BOUNDS)

    def columns(self, table: VocabTable, fertility: Fertility) -> dict[str, np.ndarray]:
        """Logarithms of the covariates in the units of the fit, and the loss."""
        data = covariate(self.mode, table, fertility)
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

    def fitted_rows(self, table: VocabTable) -> VocabTable:
        """The rows that are fitted; InputError where they determine nothing."""
        limit = self.limit(table)
        kept = table.select(table.flops >= limit)
        if len(kept) < 2 * len(PARAMETERS):
            raise InputError(
                f"only {len(kept)} of {len(table)} rows have FLOPs >= {limit:g}; "
                "approach 3 has six parameters, so lower --flops-limit or add rows"
            )
        kept.require_spread()
        require_spread(kept.tokens, "training tokens")
        return kept

    def fit(self, table: VocabTable, fertility: Fertility, resampling: Resampling) -> LossLaw:
        """The law of the table; InputError where the table does not determine it."""
        kept = self.fitted_rows(table)
        columns = self.columns(kept, fertility)
        lower, upper = (np.array(bound, float) for bound in BOUNDS[self.bounds])
        point = robust_fit.determined(
            "approach 3", PARAMETERS, residual, columns, starts=STARTS_OF[self.bounds],
            lower=lower, upper=upper,
        )  # fmt: skip
        theta, bound = point.parameters[0], point.bound[0]
        if bound[1] < 0:
            raise InputError(
                "approach 3: no vocabulary of the table is too small for its runs (A2 is on its "
                "lower bound), so it determines no best one; train longer, or add smaller "
                "vocabularies"
            )
        budget = {"ln_k_nnv": vocab_derivative.budget_constant(table, fertility), "alpha_nnv": 0.5}
        resampled = laws.Resampled()
        if resampling.draws:
            starts = STARTS
            if len(kept) > robust_fit.EXPLORED_ROWS:  # all of them took half of the time
                starts = np.concatenate([point.parameters, STARTS[::6]])
            sample = robust_fit.minimise(
                residual, columns, starts=starts, lower=lower, upper=upper,
                weights=resampling.weights(kept),
            )  # fmt: skip
            resampled = laws.resampled(
                dict(zip(PARAMETERS, sample.parameters.T, strict=True)),
                sample.converged,
                f"{resampling.described(kept)} of {len(kept):,} rows",
            )
        edges = dict(zip(PARAMETERS, np.where(bound > 0, upper, lower), strict=True))
        on_bound = {name: edges[name] for name, side in zip(PARAMETERS, bound, strict=True) if side}
        return laws.fitted(
            LossLaw, f"loss-{self.mode}", table.digest,
            constants=dict(zip(PARAMETERS, theta, strict=True)) | budget,
            units={"N_nv, N_v": "1e6 parameters", "D": "1e9 tokens", "L_u": "nats per token"},
            procedure={
                "approach": 3,
                **vars(self),
                "flops_limit": self.limit(table),
                "starts": len(STARTS_OF[self.bounds]),
                "fertility": fertility.to_json(),
            },
            columns=kept.ranged,
            draws=resampled,
            warnings=_unidentified(
                theta[4], on_bound, resampled.intervals.get("alpha2"), lower[4], upper[4]
            ),
            diagnostics={
                "rows": len(kept),
                "objective": float(point.objective[0]),
                "objective_is": "sum of Huber(1e-3) of L_u",
                "rmse": float(np.sqrt(np.mean(np.asarray(residual(theta, columns)) ** 2))),
                "gradient": float(point.gradient[0]),
                "on_bound": list(on_bound),
            },
        )  # fmt: skip


def _unidentified(alpha2, on_bound, interval, low, high) -> list[str]:
    """One sentence for each sign that the table does not identify a constant."""
    notes = [
        f"{name} is not identified: the fit puts it on its bound {edge:g}"
        for name, edge in on_bound.items()
    ]
    if alpha2 <= 0:
        notes.append(
            f"alpha2 is not identified: it turns negative ({alpha2:.2f}), so this "
            "form has no interior optimum on this table"
        )
    if interval and (interval[0] <= max(low, 0.0) + 1e-9 or interval[1] >= high - 1e-9):
        notes.append(
            f"alpha2 is not identified: its 95 % interval {interval[0]:.2f}..{interval[1]:.2f} "
            "reaches zero or a bound"
        )
    return notes
