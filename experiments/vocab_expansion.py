"""What new tokens' rows are worth before any training, by what they are made of."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.lm.expand_vocab import expand_vocab
from lminf.lm.lm import LM
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

IDENTITY = ("tokens", "rows", "seed", "language", "document")  # what tells a row from others
NONE = "none"  # the model as it is, without new tokens


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    all_pages = {"target": _texts.pages(c.text), "other": _texts.pages(c.other_text)}
    held_out = {
        language: [page[: c.characters] for page in of_language if len(page) >= c.characters]
        for language, of_language in all_pages.items()
    }
    for language, long_pages in held_out.items():
        if len(long_pages) < c.documents:
            name = c.text if language == "target" else c.other_text
            raise InputError(
                f"{name} has {len(long_pages)} pages of {c.characters} characters, but "
                f"{c.documents} were asked for; ask for fewer with --config.documents"
            )
        del long_pages[c.documents :]
    measured = set(held_out["target"])
    unmeasured = [page for page in all_pages["target"] if page[: c.characters] not in measured]
    sample = list(_texts.first_characters(unmeasured, c.sample_characters))
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
    cells = [(0, NONE, 0)] + [
        (tokens, rows, seed)
        for tokens in c.tokens
        for rows in c.rows
        for seed in range(c.replicates if rows == "random" else 1)
    ]
    done = {tuple(row[name] for name in IDENTITY) for row in out.rows()}
    with Progress(len(cells), label="vocabularies") as progress:
        for count, cell in enumerate(cells, 1):
            tokens, rows, seed = cell
            texts = {
                (language, number): text
                for language, of_language in held_out.items()
                for number, text in enumerate(of_language)
                if (*cell, language, number) not in done
            }
            model = lm
            if texts and rows != NONE:
                model = expand_vocab(lm, sample, tokens=tokens, rows=rows, seed=seed)
            for (language, number), text in texts.items():
                yield {
                    "model": c.model, "tokens": tokens, "rows": rows, "seed": seed,
                    "language": language, "document": number, **measure(model, text),
                }  # fmt: skip
            progress.update(count)


def measure(lm: LM, text: str) -> Row:
    """Loss and length of a text, by its characters: vocabularies differ in what a token is."""
    nll = lm.nll(text)
    return {
        "bits_per_character": nll.bits_per_byte * len(text.encode()) / len(text),
        "characters_per_token": len(text) / lm.count_tokens(text),
    }


# --- What is shown --------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[Row]:
    """A number of tokens, kind of rows and language a line: means over documents with intervals."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["language"], row["tokens"], row["rows"]), []).append(row)
    return [
        {
            "language": language, "tokens": tokens, "rows": kind, "group": group,
            "bits": score.over_documents(list(of_documents(group).values())),
            "characters_per_token":
                sum(row["characters_per_token"] for row in group) / len(group),
        }
        for (language, tokens, kind), group in groups.items()
    ]  # fmt: skip


def of_documents(group: list[Row]) -> dict[int, float]:
    """Bits per character of each document: the mean over seeds."""
    values: dict[int, list[float]] = {}
    for row in group:
        values.setdefault(row["document"], []).append(row["bits_per_character"])
    return {number: sum(each) / len(each) for number, each in values.items()}


def table(rows: list[Row]) -> list[Row]:
    """Bits per character with 95 % intervals over documents. The last columns are paired: what the
    new tokens cost against the model without them.
    """
    lines = {(line["language"], line["tokens"], line["rows"]): line for line in summary(rows)}
    table_rows = []
    for (language, tokens, kind), line in lines.items():
        control = lines.get(("other", tokens, kind))
        if language != "target" or control is None:
            continue
        table_rows.append({
            "new tokens": tokens,
            "rows": kind,
            "documents": len(of_documents(line["group"])),
            "characters a token": f"{line['characters_per_token']:.2f}",
            "bits/character": score.value_text(line["bits"]),
            "above the model without": above(line, lines["target", 0, NONE]),
            "other language": score.value_text(control["bits"]),
            "other, above": above(control, lines["other", 0, NONE]),
        })  # fmt: skip
    return table_rows


def above(line: Row, base: Row) -> str | None:
    if line is base:
        return None
    values, of_base = of_documents(line["group"]), of_documents(base["group"])
    differences = [values[number] - of_base[number] for number in values if number in of_base]
    return score.value_text(score.over_documents(differences)) if differences else None


def plot(rows: list[Row]) -> Figure:
    """Means and documents in the language of the new tokens, by what their rows are made of."""
    target = [
        {**row, "added": f"{row['tokens']:,} new tokens" if row["tokens"] else "as it is"}
        for row in rows if row["language"] == "target"
    ]  # fmt: skip
    return plots.bars(
        target, x="added", y="bits_per_character", by="rows", center=np.mean,
        x_label="", y_label="loss (bits/character)",
    )  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("tokens", "rows"))
