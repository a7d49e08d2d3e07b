"""Rows of finished sweeps as the tables that the laws are fitted to, in the published schemas."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from lminf.errors import InputError
from lminf.scaling.fertility import Fertility

Row = Mapping[str, Any]

# Column of the file -> how a row of experiments.vocab_sweep fills it.
VOCAB = {
    "vocab_size": "vocab_size",
    "embed_dim": "width",
    "num_characters": "characters",
    "Non_vocab_parameters": "n_nv",
    "FLOPs": "flops",
    "Lossu": "loss_u",
}
# `smooth loss` is what the step law is fitted to. The published runs smooth their training loss;
# ours measure the held-out loss, which needs no smoothing.
STEP = {
    "h": "width",
    "ffnh": "hidden",
    "numh": "heads",
    "numl": "layers",
    "lr": "lr",
    "bs": "batch_sequences",
    "loss": "train_loss",
    "smooth loss": "loss",
    "D": "d",
    "N": "n",
    "seq_len": "seq_len",
}


def vocab(rows: Sequence[Row]) -> str:
    """CSV of a vocabulary sweep: at each checkpoint of each vocabulary the best learning rate."""
    rows = one_setting(rows, VOCAB, "vocabulary")
    best: dict[tuple, Row] = {}
    for row in rows:
        key = (row["n_nv"], row["width"], row["vocab_size"], row["tokens"])
        if key not in best or row["loss_u"] < best[key]["loss_u"]:
            best[key] = row
    order = sorted(best)
    return written([{column: best[key][name] for column, name in VOCAB.items()} for key in order])


def fertility(rows: Sequence[Row]) -> Fertility:
    """Tokens per character as the sweep's own tokenizers had it, on its held-out text."""
    rows = one_setting(rows, VOCAB, "vocabulary")
    measured = {row["vocab_size"]: row["tokens_per_character"] for row in rows}
    sizes = sorted(measured)
    pairs = tuple(float(x) for size in sizes for x in (size, measured[size]))
    return Fertility(f"sweep-{rows[0]['text_digest']}", "table", pairs, (sizes[0], sizes[-1]), inf)


def step(rows: Sequence[Row]) -> str:
    """CSV of a learning rate x batch sweep: one row a run."""
    rows = one_setting(rows, STEP, "learning rate x batch")
    lines = []
    for row in rows:
        line = {column: row[name] for column, name in STEP.items()}
        line["ti"] = round(row["d"] / (row["batch_sequences"] * row["seq_len"]))
        line["D/N"] = row["d"] / row["n"]
        line["exp_name"] = f"{row['corpus']}-seed{row['seed']}"
        lines.append(line)
    return written(lines)


def one_setting(rows: Sequence[Row], columns: Mapping[str, str], what: str) -> Sequence[Row]:
    """The rows of the first seed; InputError unless all are of one sweep, text and length."""
    if not rows:
        raise InputError("there are no finished cells to collect; run the sweep first")
    missing = [name for name in columns.values() if name not in rows[0]]
    if missing:
        raise InputError(f"the rows have no {missing[0]!r}, so they are no {what} sweep's")
    for name in ("corpus", "text_digest", "seq_len", "budget_mode"):
        values = sorted({str(row[name]) for row in rows if name in row})
        if len(values) > 1:
            raise InputError(
                f"the rows have {name} {', '.join(values)}, which are not one table; choose with "
                f"--where {name}={values[0]}"
            )
    first = min(row["seed"] for row in rows)
    return [row for row in rows if row["seed"] == first]


def written(lines: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
