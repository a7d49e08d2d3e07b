"""Rows of finished sweeps as the tables that the laws are fitted to, in the published schemas."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from lminf.errors import InputError
from lminf.ranges import Range, shown
from lminf.scaling import accounting
from lminf.scaling.fertility import Fertility

Row = Mapping[str, Any]
COUNT, AMOUNT, ANY = Range(min=1, max=1e32), Range(above=0, max=1e32), Range(min=-1e6, max=1e6)
# Every field of a row that is read, and the range of its number; None: a text.
FIELDS: dict[str, Range | None] = {
    "corpus": None, "text_digest": None, "seed": Range(min=0), "lr": AMOUNT, "width": COUNT,
}  # fmt: skip
VOCAB_FIELDS = FIELDS | {
    "budget_mode": None, "vocab_size": COUNT, "n_nv": COUNT, "tokens": COUNT,
    "characters": AMOUNT, "tokens_per_character": AMOUNT, "flops": AMOUNT, "loss_u": ANY,
}  # fmt: skip
STEP_FIELDS = FIELDS | {
    "n": COUNT, "hidden": COUNT, "heads": COUNT, "layers": COUNT, "seq_len": COUNT, "d": COUNT,
    "batch_sequences": COUNT, "train_loss": AMOUNT, "loss": AMOUNT,
}  # fmt: skip
MIXED_FIELDS = {"experts": COUNT, "n_active": COUNT}

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
    """CSV of a vocabulary sweep: at each checkpoint of each vocabulary the learning rate of least
    mean loss over seeds, and of that rate a row for every seed."""
    rows = one_setting(rows, VOCAB_FIELDS, "vocabulary")
    tried: dict[tuple, dict[float, list[Row]]] = {}
    for row in rows:
        key = (row["n_nv"], row["width"], row["vocab_size"], row["tokens"])
        tried.setdefault(key, {}).setdefault(row["lr"], []).append(row)
    lines = []
    for _, rates in sorted(tried.items()):
        most = max(map(len, rates.values()))  # a seed that diverged does not favour its rate
        complete = [runs for runs in rates.values() if len(runs) == most]
        best = min(complete, key=lambda runs: sum(row["loss_u"] for row in runs))
        lines += [{column: row[name] for column, name in VOCAB.items()} for row in best]
    return written(lines)


def fertility(rows: Sequence[Row]) -> Fertility:
    """Tokens per character as the sweep's own tokenizers had it, on its held-out text."""
    rows = one_setting(rows, VOCAB_FIELDS, "vocabulary")
    measured = {row["vocab_size"]: row["tokens_per_character"] for row in rows}
    sizes = sorted(measured)
    pairs = tuple(float(x) for size in sizes for x in (size, measured[size]))
    return Fertility(f"sweep-{rows[0]['text_digest']}", "table", pairs, (sizes[0], sizes[-1]), inf)


def step(rows: Sequence[Row]) -> str:
    """CSV of a learning rate x batch sweep, one row a run: of dense models where there are any,
    else of mixtures of experts, with the columns that name what a token uses."""
    dense = [row for row in rows if isinstance(row, Mapping) and not row.get("experts")]
    fields = STEP_FIELDS if dense or not rows else STEP_FIELDS | MIXED_FIELDS
    lines = []
    for row in one_setting(dense or rows, fields, "learning rate x batch"):
        line = {column: row[name] for column, name in STEP.items()}
        if not dense:
            line |= {"Na": row["n_active"], "nume": row["experts"]}
            line["M"] = accounting.flops_per_token(
                row["n_active"], layers=row["layers"], width=row["width"], seq_len=row["seq_len"]
            )
            line["Na/N"] = row["n_active"] / row["n"]
        line["ti"] = round(row["d"] / (row["batch_sequences"] * row["seq_len"]))
        line["D/N"] = row["d"] / row["n"]
        line["exp_name"] = f"{row['corpus']}-seed{row['seed']}"
        lines.append(line)
    return written(lines)


def one_setting(
    rows: Sequence[Row], fields: Mapping[str, Range | None], what: str
) -> Sequence[Row]:
    """The rows; InputError unless all are of one sweep, text and length."""
    if not rows:
        raise InputError("there are no finished cells to collect; run the sweep first")
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of the rows"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is no row ({shown(row)}); delete it")
        for name, allowed in fields.items():
            if name not in row:
                raise InputError(f"{where} has no {name!r}, so it is of no {what} sweep")
            value = row[name]
            text = None if isinstance(value, str) else "a text"
            if problem := text if allowed is None else allowed.problem(value):
                raise InputError(
                    f"{where}: {name} is {shown(value)}, not {problem}; run that cell again"
                )
    for name in ("corpus", "text_digest", "seq_len", "budget_mode"):
        values = sorted({str(row[name]) for row in rows if name in row})
        if len(values) > 1:
            raise InputError(
                f"the rows have {name} {', '.join(values)}, which are not one table; choose with "
                f"--where {name}={values[0]}"
            )
    return rows


def written(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
