"""Tables of runs, as `lminf scaling fit` reads them, and a fit of each without resampling."""

import csv
import random
import tempfile
import zlib
from pathlib import Path

import numpy as np

from lminf import scaling
from lminf.scaling import published, synthetic
from lminf.scaling.fertility import PUBLISHED
from lminf.scaling.tables import STEP_COLUMNS, VOCAB_COLUMNS

ODD = (
    "", "nan", "inf", "1e400", "-1", "0", "1e-320", "1e308", "x", "1,5", '"', "\x00", "0x10", "1_0",
    "٣", "1e9 ", "=1+1", "9" * 400,
)  # fmt: skip


def seeds(folder: Path) -> None:
    table = synthetic.vocab_sweep(noise=0.01, seed=0, checkpoints=3)
    rows = (table.vocab_size, table.width, table.characters, table.n_nv, table.flops, table.loss)
    _write(folder / "vocab.csv", VOCAB_COLUMNS, rows)
    grid = synthetic.step_grid(noise=0.001, seed=0)
    grid = grid.select(np.arange(0, len(grid), 2))
    steps = np.round(grid.d / grid.batch)
    shape = (np.full(len(grid), 1024), np.full(len(grid), 8))
    rows = (*shape, grid.lr, grid.batch / 2048, steps, grid.loss, grid.d, grid.n)
    _write(folder / "step.csv", STEP_COLUMNS, rows)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(1e9, 1e11, 4)))
    loss = published.HOFFMANN.loss(n=n, d=d)
    _write(folder / "chinchilla.csv", ("N", "D", "loss"), (n, d, loss))
    _write(folder / "density.csv", ("N", "D", "loss", "score"), (n, d, loss, 4 - loss))


def _write(path: Path, header, columns) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))


def read(path: Path) -> None:
    _fit(path, zlib.crc32(path.read_bytes()))


def prepare() -> None:
    """The fits of undamaged tables: their programs serve all others."""
    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        for path in Path(folder).iterdir():
            for number in range(4 if path.stem == "vocab" else 1):
                _fit(path, number)


def _fit(path: Path, number: int) -> None:
    """The table under one of the procedures of its kind, which `number` chooses."""
    if path.stem == "vocab":
        procedures = (
            scaling.IsoflopFit(), scaling.IsoflopFit("ols", "converged"), scaling.DerivativeFit(),
            scaling.LossFit(),
        )  # fmt: skip
        table = scaling.read_vocab(path)
        scaling.fit(procedures[number % 4], table, fertility=PUBLISHED, draws=0)
    elif path.stem == "step":
        target = ("kept", "bowl")[number % 2]
        scaling.fit(scaling.StepFit(target=target), scaling.read_step(path), draws=20)
    elif path.stem == "density":
        scaling.fit(scaling.DensityFit(), scaling.read_curves(path, needs_score=True), draws=0)
    else:
        scaling.fit(scaling.ChinchillaFit(), scaling.read_curves(path), draws=0)


def mutate(rng: random.Random, path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    for _ in range(rng.randint(1, 3)):
        row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
        action = rng.randrange(8)
        if action == 0:
            rows[row][column : column + 1] = [rng.choice(ODD)]
        elif action == 1:  # one value for a whole column
            for other in rows[1:]:
                other[column : column + 1] = rows[-1][column : column + 1]
        elif action == 2:
            rows = rows[: max(1, row)]
        elif action == 3:  # one row many times
            rows = [rows[0], *[list(rows[-1]) for _ in rows]]
        elif action == 4:
            rows[0][column] = rng.choice(rows[0])
        elif action == 5:
            rows[row] = rows[row][:column]
        elif action == 6:
            rows.insert(row, list(rows[0]))
        else:
            scale = rng.choice((-1.0, 1e-9, 1e9, 1 + 1e-12))
            for other in rows[1:]:
                if column < len(other) and other[column].replace(".", "").isdigit():
                    other[column] = str(float(other[column]) * scale)
        rows[0] = rows[0] or ["N"]
    quote = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator=rng.choice(("\n", "\r\n", "\r")), quoting=quote).writerows(
            [cell.replace("\x00", "") if rng.random() < 0.5 else cell for cell in row]
            for row in rows
        )
    data = path.read_bytes()
    kind = rng.randrange(20)
    if kind == 0:
        data = b"\xef\xbb\xbf" + data
    elif kind == 1:
        data = data.replace(b"\n", b" ") * 200  # one line, long
    elif kind == 2:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + bytes([rng.randrange(256)]) + data[at:]
    elif kind == 3:
        data = data + b'"' + b"1" * 200_000
    path.write_bytes(data)
