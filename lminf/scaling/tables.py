"""Measured tables: reading CSV files at the edge, and refusing rows in the wrong unit.

Everything else in this package takes these values and never a path. All quantities are raw:
parameters, tokens, characters, FLOPs, batch in tokens, loss in nats per token.
"""

import csv
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from lminf.errors import InputError
from lminf.scaling import accounting
from lminf.scaling.fertility import Fertility

VOCAB_COLUMNS = (
    "vocab_size",
    "embed_dim",
    "num_characters",
    "Non_vocab_parameters",
    "FLOPs",
    "Lossu",
)
STEP_COLUMNS = ("h", "numl", "lr", "bs", "ti", "smooth loss", "D", "N")
CHINCHILLA_COLUMNS = ("N", "D", "loss")
DENSITY_COLUMNS = ("N", "D", "loss", "score")


@dataclass(frozen=True)
class VocabTable:
    """One row per checkpoint of a vocabulary sweep."""

    vocab_size: Float[np.ndarray, " rows"]
    width: Float[np.ndarray, " rows"]
    characters: Float[np.ndarray, " rows"]
    n_nv: Float[np.ndarray, " rows"]
    flops: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]  # L_u, nats per token, negative for any trained model
    digest: str  # sha256 of the file

    @property
    def n_v(self) -> Float[np.ndarray, " rows"]:
        return self.vocab_size * self.width

    @property
    def tokens(self) -> Float[np.ndarray, " rows"]:
        """D from the FLOPs identity: exact, whereas characters inherit the fertility's errors."""
        return self.flops / (6 * (self.n_nv + self.n_v))

    @property
    def family(self) -> Int[np.ndarray, " rows"]:
        return np.unique(self.n_nv, return_inverse=True)[1].astype(np.int64)

    @property
    def run(self) -> Int[np.ndarray, " rows"]:
        """One id per training run: rows of a run share noise."""
        keys = np.stack([self.n_nv, self.width, self.vocab_size], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.int64)

    def select(self, keep) -> "VocabTable":
        return VocabTable(
            *(
                getattr(self, name)[keep]
                for name in ("vocab_size", "width", "characters", "n_nv", "flops", "loss")
            ),
            digest=self.digest,
        )

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class StepTable:
    """One row per run of a learning rate x batch grid; a group shares (N, N_active, D)."""

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
        keys = np.stack([self.n, self.n_active, self.d], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.int64)

    @cached_property
    def excess(self) -> Float[np.ndarray, " rows"]:
        """L / L_min(group) - 1."""
        group = self.group
        best = np.full(group.max() + 1, np.inf)
        np.minimum.at(best, group, self.loss)
        return self.loss / best[group] - 1

    def select(self, keep) -> "StepTable":
        arrays = ("n", "n_active", "d", "lr", "batch", "loss", "flops_per_token")
        return StepTable(
            *(getattr(self, name)[keep] for name in arrays),
            seq_len=self.seq_len,
            digest=self.digest,
        )

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class CurveTable:
    """Losses of runs by size and tokens, for the Chinchilla and density laws."""

    n: Float[np.ndarray, " rows"]
    d: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"] | None  # benchmark score, density law only
    run: Int[np.ndarray, " rows"]  # rows of one run share noise
    digest: str

    def __len__(self) -> int:
        return len(self.loss)


# --- reading ------------------------------------------------------------------------------------


def read_columns(path, needed: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str], str]:
    """Needed columns as float64 (and the header), or an error that names column and row."""
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a CSV file") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; give a CSV file") from error
    try:
        rows = list(csv.reader(io.StringIO(text, newline=None)))
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV file ({error})") from error
    if not rows:
        raise InputError(f"{path}: the file is empty; a header with {', '.join(needed)} is needed")
    header = [name.strip() for name in rows[0]]
    missing = [name for name in needed if name not in header]
    if missing:
        shown = ascii(", ".join(header))[1:-1]
        raise InputError(
            f"{path}: column {', '.join(map(repr, missing))} is missing; needed are "
            f"{', '.join(needed)}, found {shown[:200] or 'nothing'}"
        )
    twice = [name for name in needed if header.count(name) > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} stands in the header twice; keep one")
    body = [(line, row) for line, row in enumerate(rows[1:], start=2) if row]
    if not body:
        raise InputError(f"{path}: there is a header but no row")
    columns = {}
    for name in needed:
        at = header.index(name)
        columns[name] = np.array([_number(path, line, name, row, at) for line, row in body])
    columns["line"] = np.array([line for line, _ in body], np.float64)
    return columns, header, hashlib.sha256(raw).hexdigest()


def _number(path, line: int, name: str, row: list[str], at: int) -> float:
    if at >= len(row):
        raise InputError(
            f"{path}: row {line} has {len(row)} fields, column {name!r} is number {at + 1}"
        )
    try:
        value = float(row[at])
    except ValueError:
        raise InputError(
            f"{path}: row {line}, column {name!r}: {row[at][:40]!r} is no number"
        ) from None
    if not np.isfinite(value):
        raise InputError(
            f"{path}: row {line}, column {name!r}: {row[at][:40]} is not finite; repair the row"
        )
    return value


def _require(path, columns, name: str, low: float, high: float, unit: str) -> np.ndarray:
    """The column, every value in [low, high]; else an error naming row, column and unit."""
    values = columns[name]
    bad = np.flatnonzero((values < low) | (values > high))
    if bad.size:
        row = int(columns["line"][bad[0]])
        raise InputError(
            f"{path}: row {row}, column {name!r}: {values[bad[0]]:g} cannot be {unit} "
            f"(expected {low:g}..{high:g}); give raw values, not thousands, millions or billions"
        )
    return values


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


def read_vocab(path, fertility: Fertility, n_nv: str = "as_published") -> VocabTable:
    """Vocabulary sweep of the schema of arXiv:2407.13623's data file.

    n_nv="from_shapes" replaces the file's parameter counts, which are nominal, by those of the
    published shapes, and rescales the FLOPs; tokens stay.
    """
    columns, _, digest = read_columns(path, VOCAB_COLUMNS)
    vocab = _require(path, columns, "vocab_size", 16, 1e7, "a vocabulary size (entries)")
    width = _require(path, columns, "embed_dim", 8, 1e6, "an embedding width (channels)")
    characters = _require(path, columns, "num_characters", 1e3, 1e17, "training characters")
    params = _require(path, columns, "Non_vocab_parameters", 1e4, 1e14, "non-vocabulary parameters")
    flops = _require(path, columns, "FLOPs", 1e6, 1e32, "training FLOPs")
    loss = _require(path, columns, "Lossu", -30, 30, "a unigram-normalised loss (nats per token)")
    expected = 6 * (params + vocab * width) * characters * fertility.tokens_per_character(vocab)
    _require_consistent(
        path, columns, "FLOPs", flops / expected,
        f"6 (N_nv + V d) H f(V) with fertility {fertility.name!r}",
    )  # fmt: skip
    table = VocabTable(vocab, width, characters, params, flops, loss, digest)
    if n_nv == "as_published":
        return table
    if n_nv == "from_shapes":
        return _from_shapes(path, table)
    raise InputError(f"n_nv={n_nv!r} is unknown; use 'as_published' or 'from_shapes'")


def _from_shapes(path, table: VocabTable) -> VocabTable:
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
    return VocabTable(
        table.vocab_size, table.width, table.characters, counts, flops, table.loss, table.digest
    )


def read_step(path, seq_len: int) -> StepTable:
    """Learning rate x batch grid of the schema of arXiv:2503.04715, dense or mixture of experts.

    `seq_len` in tokens serves files without a seq_len column.
    """
    columns, header, digest = read_columns(path, STEP_COLUMNS)
    extra = [name for name in ("seq_len", "Na", "ffnh") if name in header]
    more, _, _ = read_columns(path, tuple(extra)) if extra else ({}, None, None)
    columns.update(more)
    n = _require(path, columns, "N", 1e4, 1e14, "non-embedding parameters")
    d = _require(path, columns, "D", 1e3, 1e17, "training tokens")  # checked by bs and ti too
    lr = _require(path, columns, "lr", 1e-8, 1.0, "a peak learning rate")
    sequences = _require(path, columns, "bs", 1, 1e6, "a batch in sequences")
    steps = _require(path, columns, "ti", 1, 1e9, "a number of steps")
    loss = _require(path, columns, "smooth loss", 1e-3, 30, "a loss (nats per token)")
    layers = _require(path, columns, "numl", 1, 1e4, "a number of layers")
    width = _require(path, columns, "h", 8, 1e6, "a width (channels)")
    columns.setdefault("seq_len", np.full(len(n), float(seq_len)))
    lengths = _require(path, columns, "seq_len", 1, 1e8, "a sequence length (tokens)")
    if np.unique(lengths).size > 1:
        raise InputError(f"{path}: column 'seq_len' has several values; give one file for each")
    _require_consistent(
        path, columns, "D", d / (sequences * lengths * steps), "bs x seq_len x ti (tokens)"
    )
    active = _require(path, columns, "Na", 1e4, 1e14, "active parameters") if "Na" in columns else n
    if "Na" not in columns and "ffnh" in columns:
        hidden = _require(path, columns, "ffnh", 1, 1e7, "a width of the MLP (channels)")
        shapes = accounting.block_parameters(layers, width, hidden)
        _require_consistent(path, columns, "N", n / shapes, "numl (4 h^2 + 3 h ffnh)")
    per_token = accounting.flops_per_token(active, layers=layers, width=width, seq_len=lengths)
    return StepTable(
        n, active, d, lr, sequences * lengths, loss, per_token, int(lengths[0]), digest
    )


def read_curves(path, *, needs_score: bool) -> CurveTable:
    """Runs by N, D (raw) and loss; an optional column `run` names runs that share noise."""
    needed = DENSITY_COLUMNS if needs_score else CHINCHILLA_COLUMNS
    columns, header, digest = read_columns(path, needed)
    n = _require(path, columns, "N", 1e4, 1e14, "parameters")
    d = _require(path, columns, "D", 1e5, 1e17, "training tokens")
    loss = _require(path, columns, "loss", 1e-6, 100, "a loss (nats per token)")
    score = None
    if needs_score:
        score = _require(path, columns, "score", -1e6, 1e6, "a benchmark's score")
    run = np.arange(len(n))
    if "run" in header:
        run = np.unique(read_columns(path, ("run",))[0]["run"], return_inverse=True)[1]
    return CurveTable(n, d, loss, score, run.astype(np.int64), digest)
