"""One vocabulary for a budget, or a plain statement that the published runs determine none.

The loss laws of approach 3 fit the same rows almost equally well and disagree on the best V. The
recommendation is the V whose waste of FLOPs by the worst of them is least (minimax). What else a
fit has to choose is varied in turn, and V chosen again each time:

law     which covariates (vocab_loss.MODES)
rows    the families of models that are fitted, resampled with replacement
limit   the FLOPs below which rows are dropped; released: 2.18e17, stated: a larger one

A vocabulary is determined when a wrong choice among these costs little: the recommended V wastes
at most MOST_WASTED of the FLOPs by every law at every limit and in 97.5 % of the resampled fits,
and no choice pushes the optimum out of the searched range.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import practice, published, resample, stored, vocab
from lminf.scaling.vocab_loss import MODES, PARAMETERS, LossLaw

MOST_WASTED = 0.10  # share of the FLOPs
FLAT = 0.01  # more waste than the recommended V's, by the worst law
SIZES = np.geomspace(vocab.SMALLEST_VOCAB, vocab.LARGEST_VOCAB, 800)
PRICED = (32_768, 65_536, 131_072, 262_144)  # entries
Laws = Sequence[LossLaw]


@dataclass(frozen=True)
class Refits:
    """Approach 3 fitted to the published sweep under every choice, by all of `MODES`."""

    source: str  # which rows
    rows: int
    all_rows: Laws  # above the released FLOPs limit
    limits: Mapping[float, Laws]
    resampled: Sequence[Laws]  # families with replacement


def _laws(fits: Mapping[str, Sequence[float]], ln_k_nnv: float, source: str) -> list[LossLaw]:
    base = published.LOSS_TOKENS
    return [
        dataclasses.replace(
            base,
            version=f"refit-loss-{mode}",
            source=source,
            constants=dict(zip(PARAMETERS, fits[mode.removeprefix("consistent-")], strict=True))
            | {"ln_k_nnv": ln_k_nnv, "alpha_nnv": 0.5},
            procedure={**base.procedure, "mode": mode},
            draws={},
            warnings=(),
        )
        for mode in MODES
    ]


def published_refits() -> Refits:
    """The fits that tests/scaling/make_published.py made of all published rows."""
    data = stored.read("vocab_refits.json")
    of = {
        kind: [_laws(fits, data["ln_k_nnv"], data["source"]) for fits in data[kind]]
        for kind in ("all_rows", "limits", "families")
    }
    limits = dict(zip(data["flops_limits"], of["limits"], strict=True))
    return Refits(data["source"], data["rows"], of["all_rows"][0], limits, of["families"])


class Range(NamedTuple):
    """The V chosen again under every variant of one choice; an infinite end is open."""

    choice: str
    low: float
    high: float


@dataclass(frozen=True)
class Recommendation:
    """A vocabulary of least waste by the worst law, and whether the rows determine it."""

    n_nv: float
    width: float
    flops: float
    vocab_size: float  # entries
    determined: bool
    by_law: Mapping[str, float]  # each law's own optimum, entries
    waste_by_laws: float  # share of the FLOPs, by the worst law
    waste: float  # the same with the limit and the rows chosen otherwise
    flat: tuple[float, float]  # entries that waste at most FLAT more by the worst law
    costs: Mapping[int, float]  # entries -> share of the FLOPs wasted by the worst law
    ranges: tuple[Range, ...]
    fits: int  # of all laws under all choices
    without: int  # those of them without an optimum, which are left out
    source: str

    @property
    def interval(self) -> tuple[float, float]:
        """Entries from the lowest to the highest end of all ranges; infinite: open."""
        return min(r.low for r in self.ranges), max(r.high for r in self.ranges)

    def sentences(self, multiple: int = 128) -> list[str]:
        """The recommendation, or that there is none, and what it rests on."""
        low, high = self.interval
        span = f"{entries(low)} to {entries(high)} entries"
        if self.determined:
            size = int(-(-self.vocab_size // multiple) * multiple)
            first = (
                f"Take V = {size:,}: by the worst of the loss laws it wastes "
                f"{100 * self.waste_by_laws:.1f} % of the FLOPs, and at most "
                f"{100 * self.waste:.0f} % under another choice of rows or FLOPs limit. The "
                f"choices put V at {span}; {entries(self.flat[0])} to {entries(self.flat[1])} "
                f"waste at most {100 * FLAT:.0f} % more by the laws as fitted (no interval)."
            )
        else:
            why = f"V = {entries(self.vocab_size)}, the best compromise of the loss laws, wastes "
            first = (
                f"Not determined: these runs leave {span} open. {why}{100 * self.waste:.0f} % of "
                f"the FLOPs under another choice of rows or FLOPs limit, and a recommendation may "
                f"waste {100 * MOST_WASTED:.0f} %. {practice.vocabularies(self.n_nv)}"
            )
        costs = ", ".join(f"{v // 1024}K {100 * lost:.1f} %" for v, lost in self.costs.items())
        ranges = "; ".join(f"{r.choice} {entries(r.low)} to {entries(r.high)}" for r in self.ranges)
        laws = ", ".join(f"{name} {entries(v)}" for name, v in self.by_law.items())
        return [
            first,
            f"FLOPs wasted by the worst law as fitted: {costs}.",
            f"V when one choice is varied: {ranges}. {self.without} of the {self.fits} fits have "
            f"no optimum and are left out. Fitted to {self.source}.",
            f"The laws say {laws}: {DISAGREEMENT}",
            TOKENIZATION,
        ]


DISAGREEMENT = (
    "they fit the losses almost equally well and differ in what stands for the data, H f(V/1000) "
    "or true tokens, in the fit and in the optimum; the sweep trains every V of a family on as "
    "many tokens and ends at 4.4e20 FLOPs, so it hardly tells the two apart."
)
TOKENIZATION = (
    "Evidence against growing V with the budget: over 988 models of 50M to 7B parameters the "
    "compression of best loss falls with compute (arXiv:2605.01188)."
)


def entries(size: float) -> str:
    """A number of entries; words for an open end."""
    if np.isfinite(size):
        return f"{size:,.0f}"
    return f"below {vocab.SMALLEST_VOCAB:,.0f}" if size < 0 else f"above {vocab.LARGEST_VOCAB:,.0f}"


def recommend(refits: Refits, **model: Unpack[vocab.Query]) -> Recommendation:
    """The vocabulary of a model at its FLOPs or training tokens."""
    start, n_nv, tokens = refits.all_rows[0].optimum(**model), model["n_nv"], model.get("tokens")
    query = {"n_nv": n_nv, "width": start.width, "flops": start.flops}
    size, wasted = _minimax(refits.all_rows, **query)
    if tokens is not None:  # which fix the FLOPs of the chosen V alone
        for _ in range(4):
            n_v = size * query["width"] if np.isfinite(size) else start.n_v
            query["flops"] = 6 * (n_nv + n_v) * tokens
            size, wasted = _minimax(refits.all_rows, **query)
    if not np.isfinite(size):
        raise InputError(f"no law has a loss-optimal vocabulary at N={n_nv:g}; fit another table")
    optima = {law.version: _optimum(law, **query) for law in refits.all_rows}
    by_law = {version: optimum for version, optimum in optima.items() if np.isfinite(optimum)}
    limits = [_minimax(laws, **query)[0] for laws in refits.limits.values()]
    rows = [_minimax(laws, **query)[0] for laws in refits.resampled]
    ranges = (
        Range("law", min(by_law.values()), max(by_law.values())),
        Range("FLOPs limit", min(limits), max(limits)),
        Range("rows", *resample.percentile_interval(np.array(rows))),
    )
    by_limit = _wastes(size, refits.limits.values(), **query)
    by_rows = _wastes(size, refits.resampled, **query)
    fits = len(MODES) * (len(limits) + len(rows))
    least = float(wasted.min())
    waste = max(least, max(by_limit), float(np.percentile(by_rows, 97.5)))
    determined = waste <= MOST_WASTED and all(np.isfinite(r[1:]).all() for r in ranges)
    costs = np.interp(np.log(PRICED), np.log(SIZES), wasted)
    flat = SIZES[wasted <= least + FLAT]
    return Recommendation(
        n_nv, query["width"], query["flops"], size, determined, by_law, least, waste,
        (float(flat[0]), float(flat[-1])), dict(zip(PRICED, map(float, costs), strict=True)),
        ranges, fits, fits - len(by_limit) - len(by_rows), refits.source,
    )  # fmt: skip


def _optimum(law: LossLaw, *, n_nv: float, width: float, flops: float) -> float:
    """V of least loss; infinite where that is an end of the searched range."""
    constants = {name: np.array([value]) for name, value in law.constants.items()}
    n_v = law.n_v(constants, n_nv=n_nv, width=width, flops=np.array([flops]))
    return float(n_v[0]) / width


def _minimax(laws: Laws, **query: float) -> tuple[float, Float[np.ndarray, " sizes"]]:
    """(V of least waste by the worst law, that waste for every one of SIZES). Laws without an
    optimum are left out; where none has one, V is infinite."""
    optima = [_optimum(law, **query) for law in laws]
    inside = [law for law, size in zip(laws, optima, strict=True) if np.isfinite(size)]
    if not inside:
        return max(optima), np.ones_like(SIZES)
    wasted = np.max([law.flops_lost(SIZES, **query) for law in inside], axis=0)
    return float(SIZES[wasted.argmin()]), wasted


def _wastes(size: float, choices: Iterable[Laws], **query: float) -> list[float]:
    """Share of the FLOPs that V wastes by every law of every choice that has an optimum."""
    return [
        float(law.flops_lost(size, **query))
        for laws in choices
        for law in laws
        if np.isfinite(_optimum(law, **query))
    ]
