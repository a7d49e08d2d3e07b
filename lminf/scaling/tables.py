"""Measured tables: reading CSV files at the edge, and refusing rows in the wrong unit.

Everything else in this package takes these values and never a path. All quantities are raw:
parameters, tokens, characters, FLOPs, batch in tokens, loss in nats per token.
"""

import csv
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from lminf.atomic import read_bytes
from lminf.errors import InputError
from lminf.scaling import accounting, laws
from lminf.scaling.accounting import Schema, schema
from lminf.scaling.fertility import PUBLISHED, Fertility

VOCAB_COLUMNS, STEP_COLUMNS = schema("vocab"), schema("step")  # D is checked by bs and ti too
LN_N_UNIT, LN_D_UNIT = np.log(1e6), np.log(1e9)  # parameters and tokens inside the fits


class _Table:
    """Columns of equal length, and what identifies the file."""

    loss: Float[np.ndarray, " rows"]

    def select(self, rows: np.ndarray) -> Self:
        """The table of these rows alone, by a mask or their numbers."""
        columns = {
            item.name: getattr(self, item.name)[rows]
            for item in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if isinstance(getattr(self, item.name), np.ndarray)
        }
        return dataclasses.replace(self, **columns)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class VocabTable(_Table):
    """One row per checkpoint of a vocabulary sweep."""

    CLUSTERS = ("run", "family")
    vocab_size: Float[np.ndarray, " rows"]
    width: Float[np.ndarray, " rows"]
    characters: Float[np.ndarray, " rows"]
    n_nv: Float[np.ndarray, " rows"]
    flops: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]  # L_u, nats per token, negative for any trained model
    digest: str  # sha256 of the file

    @property
    def n_v(self) -> Float[np.ndarray, " rows"]:
        """Parameters of one table of the vocabulary, V d."""
        return self.vocab_size * self.width

    @property
    def tokens(self) -> Float[np.ndarray, " rows"]:
        """D from the FLOPs identity: exact, whereas characters inherit the fertility's errors."""
        return self.flops / (6 * (self.n_nv + self.n_v))

    @property
    def ranged(self) -> dict[str, np.ndarray]:
        """The columns whose range is a law's fitted range."""
        return {"n_nv": self.n_nv, "flops": self.flops, "vocab": self.vocab_size}

    def runs_of(self, n_nv: float) -> Iterator[Self]:
        """The runs of a family by rising vocabulary, the rows of each by rising FLOPs."""
        family = self.select(self.n_nv == n_nv)
        for size in np.unique(family.vocab_size):
            run = family.select(family.vocab_size == size)
            yield run.select(np.argsort(run.flops))

    def require_spread(self) -> None:
        """Error unless N_nv, V and the loss vary."""
        require_spread(self.n_nv, "Non_vocab_parameters")
        require_spread(self.vocab_size, "vocab_size")
        require_spread(self.loss, "loss", minimum=1)

    @property
    def family(self) -> Int[np.ndarray, " rows"]:
        """One id per N_nv."""
        return _ids(self.n_nv)

    @property
    def run(self) -> Int[np.ndarray, " rows"]:
        """One id per training run: rows of a run share noise."""
        return _ids(self.n_nv, self.width, self.vocab_size)


@dataclass(frozen=True)
class StepTable(_Table):
    """One row per run of a learning rate x batch grid; a group shares (N, N_active, D)."""

    CLUSTERS = ("group",)
    n: Float[np.ndarray, " rows"]
    n_active: Float[np.ndarray, " rows"]  # equals n for dense models
    d: Float[np.ndarray, " rows"]
    lr: Float[np.ndarray, " rows"]
    batch: Float[np.ndarray, " rows"]  # tokens
    loss: Float[np.ndarray, " rows"]  # smoothed training loss
    flops_per_token: Float[np.ndarray, " rows"]  # M, with attention
    seq_len: int
    digest: str

    @cached_property
    def group(self) -> Int[np.ndarray, " rows"]:
        """One id per (N, N_active, D)."""
        return _ids(self.n, self.n_active, self.d)

    @cached_property
    def excess(self) -> Float[np.ndarray, " rows"]:
        """L / L_min(group) - 1."""
        group = self.group
        best = np.full(group.max() + 1, np.inf)
        np.minimum.at(best, group, self.loss)
        return self.loss / best[group] - 1


@dataclass(frozen=True)
class CurveTable(_Table):
    """Losses of runs by size and tokens, for the Chinchilla and density laws."""

    CLUSTERS = ("run",)
    n: Float[np.ndarray, " rows"]
    d: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"] | None  # benchmark score, density law only
    run: Int[np.ndarray, " rows"]  # rows of one run share noise
    digest: str

    def log_columns(self) -> dict[str, Float[np.ndarray, " rows"]]:
        """ln of N in 1e6, of D in 1e9 and of the loss: what the parametric losses are fitted to."""
        return {
            "ln_n": np.log(self.n) - LN_N_UNIT,
            "ln_d": np.log(self.d) - LN_D_UNIT,
            "ln_loss": np.log(self.loss),
        }

    def require_spread(self) -> None:
        """Error unless N, D and the loss vary."""
        require_spread(self.n, "N")
        require_spread(self.d, "D")
        require_spread(self.loss, "loss", minimum=1)


def _ids(*columns: np.ndarray) -> Int[np.ndarray, " rows"]:
    """One id per combination of values."""
    keys = np.stack(columns, axis=1)
    return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def require_spread(
    values: Float[np.ndarray, " rows"], name: str, *, minimum: float = 1.02, instead: str = ""
) -> None:
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
            f"exponent is not determined; add rows with other values of {name}{instead}"
        )


# --- reading ------------------------------------------------------------------------------------


def read_columns(
    path: Path | str, needed: Schema, optional: Schema | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """(needed columns and those optional ones that there are, as float64; sha256 of the file), or
    an error that names column and row; "line" is the row's number in the file."""
    try:
        raw = read_bytes(Path(path))
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=None)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as a CSV file ({reason})") from error
    if not rows:
        raise InputError(f"{path}: the file is empty; a header with {', '.join(needed)} is needed")
    header = [name.strip() for name in rows[0]]
    missing = [name for name in needed if name not in header]
    if missing:
        names = ascii(", ".join(header))[1:-1]
        raise InputError(
            f"{path}: column {', '.join(map(repr, missing))} is missing; needed are "
            f"{', '.join(needed)}, found {names[:200] or 'nothing'}"
        )
    twice = [name for name in needed if header.count(name) > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} stands in the header twice; keep one")
    body = [(line, row) for line, row in enumerate(rows[1:], start=2) if row]
    if not body:
        raise InputError(f"{path}: there is a header but no row")
    for line, row in body:
        if len(row) > len(header):
            raise InputError(
                f"{path}: row {line} has {len(row)} cells for {len(header)} columns; write "
                f"decimals with a point, and quote a cell that holds a comma"
            )
    schema = dict(needed) | {
        name: bounds for name, bounds in (optional or {}).items() if name in header
    }
    columns = {"line": np.array([line for line, _ in body], np.float64)}
    for name in schema:
        index = header.index(name)
        columns[name] = np.array([_number(path, line, name, row, index) for line, row in body])
    for name, (low, high, unit) in schema.items():
        bad = np.flatnonzero((columns[name] < low) | (columns[name] > high))
        if bad.size:
            raise InputError(
                f"{path}: row {body[bad[0]][0]}, column {name!r}: {columns[name][bad[0]]:g} cannot "
                f"be {unit} (expected {low:g}..{high:g}); give raw values, not thousands, millions "
                "or billions"
            )
    return columns, hashlib.sha256(raw).hexdigest()


def _number(path: Path | str, line: int, name: str, row: list[str], index: int) -> float:
    if index >= len(row):
        raise InputError(
            f"{path}: row {line} has {len(row)} fields, column {name!r} is number {index + 1}"
        )
    try:
        value = float(row[index])
    except ValueError:
        raise InputError(
            f"{path}: row {line}, column {name!r}: {row[index][:40]!r} is no number"
        ) from None
    if not np.isfinite(value):
        raise InputError(
            f"{path}: row {line}, column {name!r}: {row[index][:40]} is not finite; repair the row"
        )
    return value


def _require_consistent(path, columns, name: str, ratio: np.ndarray, formula: str) -> None:
    """Error for the first row whose `ratio` (column over formula) is off by more than 5 %."""
    bad = np.flatnonzero(np.abs(ratio - 1) > 0.05)
    if bad.size:
        row = int(columns["line"][bad[0]])
        raise InputError(
            f"{path}: row {row}, column {name!r}: {columns[name][bad[0]]:g} is "
            f"{ratio[bad[0]]:.3g} times {formula}; the units of this row differ from the others "
            f"({bad.size} of {ratio.size} rows)"
        )


def read_vocab(
    path: Path | str, *, fertility: Fertility = PUBLISHED, n_nv: str = "as_published"
) -> VocabTable:
    """Vocabulary sweep of the schema of arXiv:2407.13623's data file.

    n_nv="from_shapes" replaces the file's parameter counts, which are nominal, by those of the
    published shapes, and rescales the FLOPs; tokens stay.
    """
    laws.require_choice("n_nv", n_nv, ("as_published", "from_shapes"))
    columns, digest = read_columns(path, VOCAB_COLUMNS)
    vocab, width, characters, parameters, flops, loss = (columns[name] for name in VOCAB_COLUMNS)
    expected = 6 * (parameters + vocab * width) * characters
    expected = expected * fertility.tokens_per_character(vocab)
    _require_consistent(
        path, columns, "FLOPs", flops / expected,
        f"6 (N_nv + V d) H f(V) with fertility {fertility.name!r}",
    )  # fmt: skip
    table = VocabTable(vocab, width, characters, parameters, flops, loss, digest)
    return _from_shapes(path, table) if n_nv == "from_shapes" else table


def _from_shapes(path: Path | str, table: VocabTable) -> VocabTable:
    counts = np.empty_like(table.n_nv)
    for value in np.unique(table.n_nv):
        if int(value) not in accounting.SWEEP_SHAPES:
            raise InputError(
                f"{path}: no shapes are known for Non_vocab_parameters={value:.0f}; known are "
                f"{sorted(accounting.SWEEP_SHAPES)}; use n_nv='as_published'"
            )
        shape = accounting.SWEEP_SHAPES[int(value)]
        counts[table.n_nv == value] = accounting.block_parameters(*shape)
    flops = 6 * (counts + table.n_v) * table.tokens
    return dataclasses.replace(table, n_nv=counts, flops=flops)


def read_step(path: Path | str, *, seq_len: int = 2048) -> StepTable:
    """Learning rate x batch grid of the schema of arXiv:2503.04715, dense or mixture of experts.

    `seq_len` in tokens serves files without a seq_len column.
    """
    columns, digest = read_columns(path, STEP_COLUMNS, schema("step, optional"))
    width, layers, lr, sequences, steps, loss, d, n = (columns[name] for name in STEP_COLUMNS)
    lengths = columns.get("seq_len", np.full(len(n), float(seq_len)))
    if np.unique(lengths).size > 1:
        raise InputError(f"{path}: column 'seq_len' has several values; give one file for each")
    _require_consistent(
        path, columns, "D", d / (sequences * lengths * steps), "bs x seq_len x ti (tokens)"
    )
    active = columns.get("Na", n)
    if "Na" not in columns and "ffnh" in columns:
        shapes = accounting.block_parameters(layers, width, columns["ffnh"])
        _require_consistent(path, columns, "N", n / shapes, "numl (4 h^2 + 3 h ffnh)")
    per_token = accounting.flops_per_token(active, layers=layers, width=width, seq_len=lengths)
    return StepTable(
        n, active, d, lr, sequences * lengths, loss, per_token, int(lengths[0]), digest
    )


def read_curves(path: Path | str, *, needs_score: bool = False) -> CurveTable:
    """Runs by N, D (raw) and loss; an optional column `run` names runs that share noise."""
    needed = schema("density" if needs_score else "chinchilla")
    columns, digest = read_columns(path, needed, schema("run"))
    n, d, loss = (columns[name] for name in ("N", "D", "loss"))
    run = _ids(columns["run"]) if "run" in columns else np.arange(len(n))
    return CurveTable(n, d, loss, columns.get("score"), run, digest)
