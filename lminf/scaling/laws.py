"""What every fitted or published law carries: constants with units, range, draws, provenance.

A law is a value. It serialises to JSON with its bootstrap draws, so that whoever loads it gets
the same intervals without the data.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from lminf.errors import InputError
from lminf.scaling import resample

FORMAT = 1
MINIMUM_DRAWS = 20
MINIMUM_CONVERGED = 0.8  # share of draws; below it no interval is given


class Interval(NamedTuple):
    low: float
    high: float
    method: str


@dataclass(frozen=True, kw_only=True)
class Law:
    kind: ClassVar[str] = ""
    version: str
    source: str  # the paper, or the digest of the data
    constants: Mapping[str, float]
    units: Mapping[str, str]
    procedure: Mapping[str, Any]
    fitted_range: Mapping[str, tuple[float, float]]
    draws: Mapping[str, np.ndarray] = field(default_factory=dict)  # constant -> [draws]
    resampling: str = ""  # how the draws were made; empty: there are none
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of constants, 95 %
    warnings: tuple[str, ...] = ()
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def percentiles(self, values: Float[np.ndarray, " draws"]) -> Interval:
        """95 % interval of a quantity that has a value for each of the law's draws."""
        return Interval(*resample.percentile_interval(values), self.resampling)

    def constant_draws(self) -> dict[str, Float[np.ndarray, " draws"]]:
        """Every constant under each draw; what was not resampled is repeated."""
        if not self.draws:
            reason = self.procedure.get("no_draws", "fit with draws > 0")
            raise InputError(f"{self.version} carries no draws, so no interval: {reason}")
        count = len(next(iter(self.draws.values())))
        return {
            name: np.broadcast_to(np.asarray(self.draws.get(name, value), float), (count,))
            for name, value in self.constants.items()
        }

    def outside(self, query: Mapping[str, float]) -> list[str]:
        """One sentence for each quantity of the query that lies outside the fitted range."""
        sentences = []
        for name, (low, high) in self.fitted_range.items():
            value = query.get(name, np.nan)
            if value < low * (1 - 1e-9) or value > high * (1 + 1e-9):
                factor, side = (value / high, "above") if value > high else (low / value, "below")
                sentences.append(
                    f"{name}={value:.3g} is {factor:.3g} times {side} the fitted range "
                    f"{low:.3g}..{high:.3g}: an extrapolation"
                )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """The law as plain values; nine digits of every draw."""
        return {"format": FORMAT, "kind": self.kind} | _plain(vars(self))

    def save(self, path: Path | str) -> None:
        """Writes the law as JSON, which `lminf.scaling.load` reads."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [float(f"{item:.9g}") for item in value]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def from_json(data: Mapping[str, Any], kinds: Mapping[str, type[Law]], where: str) -> Law:
    """The law that `Law.to_json` stored; `where` names the file in an error."""
    if not isinstance(data, Mapping) or "kind" not in data:
        raise InputError(f"{where}: this JSON holds no law; write one with `lminf scaling fit`")
    if data["kind"] not in kinds:
        raise InputError(
            f"{where}: law kind {data['kind']!r} is unknown; known are {', '.join(kinds)}"
        )
    if data.get("format") != FORMAT:
        raise InputError(
            f"{where}: law format {data.get('format')!r}, this version reads {FORMAT}; fit again"
        )
    law = kinds[data["kind"]]
    names = [item.name for item in fields(law)]
    missing = [name for name in names if name not in data]
    if missing:
        raise InputError(f"{where}: the law lacks {', '.join(missing)}; fit again")
    values = {name: data[name] for name in names}
    values["draws"] = {name: np.asarray(draw, float) for name, draw in data["draws"].items()}
    for name in ("fitted_range", "intervals"):
        values[name] = {key: tuple(pair) for key, pair in data[name].items()}
    values["warnings"] = tuple(data["warnings"])
    return law(**values)


class Resampled(NamedTuple):
    """The fields of a law that its resampled fits fill."""

    draws: Mapping[str, np.ndarray] = {}
    resampling: str = ""
    intervals: Mapping[str, tuple[float, float]] = {}
    warnings: tuple[str, ...] = ()


def resampled(draws: Mapping[str, np.ndarray], converged: np.ndarray, how: str) -> Resampled:
    """The converged draws with their 95 % intervals; a warning alone where too few converged."""
    if not converged.size:
        return Resampled()
    count = int(np.sum(converged))
    if count < max(MINIMUM_DRAWS, MINIMUM_CONVERGED * converged.size):
        warning = (
            f"no interval: only {count} of {converged.size} resampled fits converged ({how}); the "
            "law is not identified by this table"
        )
        return Resampled(warnings=(warning,))
    kept = {name: np.asarray(values)[converged] for name, values in draws.items()}
    intervals = {name: resample.percentile_interval(values) for name, values in kept.items()}
    return Resampled(kept, f"{how}, {count} of {converged.size} converged", intervals)


AnyLaw = TypeVar("AnyLaw", bound=Law)


def fitted(
    law: type[AnyLaw],
    name: str,
    digest: str,
    *,
    constants: Mapping[str, float],
    units: Mapping[str, str],
    procedure: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    draws: Resampled,
    warnings: Sequence[str] = (),
    diagnostics: Mapping[str, Any],
) -> AnyLaw:
    """The law of a table with that sha256; its fitted range is that of the table's `columns`."""
    return law(
        version=f"{name}-{digest[:8]}",
        source=f"data sha256 {digest}",
        constants={key: float(value) for key, value in constants.items()},
        units=units,
        procedure=procedure,
        fitted_range={key: (float(v.min()), float(v.max())) for key, v in columns.items()},
        draws=draws.draws,
        resampling=draws.resampling,
        intervals=draws.intervals,
        warnings=(*draws.warnings, *warnings),
        diagnostics=diagnostics,
    )


def require_choice(name: str, value: Any, valid: Collection[str]) -> None:
    """Error unless the value is one of the valid ones."""
    if value not in valid:
        raise InputError(f"{name}={value!r} is unknown; use one of {', '.join(valid)}")
