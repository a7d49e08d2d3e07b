"""What every fitted or published law carries: constants with units, range, draws, provenance.

A law is a value. It serialises to JSON with its bootstrap draws, so that whoever loads it gets
the same intervals without the data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lminf.errors import InputError
from lminf.scaling import engine, resample

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

    def parameter_interval(self, name: str, level: float = 0.95) -> Interval:
        """Percentile interval of one constant over the draws."""
        if name not in self.constants:
            raise InputError(
                f"{self.version} has no constant {name!r}; it has {', '.join(self.constants)}"
            )
        if name not in self.draws:
            raise InputError(f"{self.version} carries no draws of {name!r}; fit with draws > 0")
        return Interval(*resample.percentile_interval(self.draws[name], level), self.resampling)

    def outside(self, query: Mapping[str, float]) -> list[str]:
        """One sentence for each quantity of the query that lies outside the fitted range."""
        found = []
        for name, value in query.items():
            if name in self.fitted_range and np.isfinite(value):
                low, high = self.fitted_range[name]
                if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                    factor = value / high if value > high else low / value
                    side = "above" if value > high else "below"
                    found.append(
                        f"{name}={value:.3g} is {factor:.3g} times {side} the fitted range "
                        f"{low:.3g}..{high:.3g}: an extrapolation"
                    )
        return found

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"format": FORMAT, "kind": self.kind}
        for item in fields(self):
            data[item.name] = _plain(getattr(self, item.name))
        return data

    def save(self, path) -> None:
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


def draw_summary(
    draws: Mapping[str, np.ndarray], converged: np.ndarray, how: str
) -> tuple[dict[str, np.ndarray], str, dict[str, tuple[float, float]], tuple[str, ...]]:
    """(draws kept, how they were made, 95 % intervals, warnings); none where too few converged."""
    good = int(np.sum(converged))
    if good < max(MINIMUM_DRAWS, MINIMUM_CONVERGED * converged.size):
        warning = (
            f"no interval: only {good} of {converged.size} resampled fits converged ({how}); the "
            "law is not identified by this table"
        )
        return {}, "", {}, (warning,)
    kept = {name: np.asarray(values)[converged] for name, values in draws.items()}
    spans = {name: resample.percentile_interval(values, 0.95) for name, values in kept.items()}
    return kept, f"{how}, {good} of {converged.size} converged", spans, ()


def require_determined(
    what: str, names: Sequence[str], residual: engine.Residual, columns, found: engine.Solutions
) -> None:
    """Error unless the first draw converged and the rows tell its free parameters apart."""
    if not np.all(np.isfinite(found.parameters[0])):
        raise InputError(f"{what}: the fit has no finite result; the table does not determine it")
    loose = [names[index] for index in engine.undetermined(residual, columns, found)]
    if loose:
        raise InputError(
            f"{what}: the table does not determine {', '.join(loose)}: other values of them fit it "
            "as well; add rows with other values of what they belong to (three of each at least)"
        )
    if not found.converged[0]:
        raise InputError(
            f"{what}: the fit did not converge (projected gradient {found.gradient[0]:.1e} of its "
            "scale), so there is no result; the table does not determine this law"
        )


def require_spread(values, name: str, *, minimum: float = 1.02, instead: str = "") -> None:
    """Error when a column hardly varies, so that nothing can be fitted to it."""
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        raise InputError(
            f"the table has a single {name} ({low:g}), which determines no law; add rows with "
            f"other values of it{instead}"
        )
    if low > 0 and high / low < minimum:
        raise InputError(
            f"{name} varies by only {100 * (high / low - 1):.2g} % ({low:g}..{high:g}), so its "
            f"exponent is not determined; add rows with other values of {name}"
            f"{instead}"
        )
