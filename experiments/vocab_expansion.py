"""What new tokens' rows are worth before and during training, by what they are made of.

Trained are the outer layers and the tables, on plain text of the language, with or without further
heads for the tokens after the next one.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.config import closest, parse_choice
from lminf.data.windows import RandomWindows
from lminf.errors import InputError
from lminf.evals import score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.lm.expand_vocab import expand_vocab
from lminf.lm.lm import LM
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress
from lminf.train import frozen
from lminf.train.multi_token import MultiToken
from lminf.train.optim import OPTIMIZERS
from lminf.train.outer_layers import OuterLayers
from lminf.train.schedules import SCHEDULES

# What tells a row from others: the model's, and the text's.
CELL, IDENTITY = ("tokens", "rows", "seed", "mtp_heads"), ("steps", "language", "document")
NONE = "none"  # the model as it is, without new tokens
SENTENCE_END = r"(?<=[.!?;·])\s+|\n"  # a semicolon asks in Greek


def check(c: ConfigDict, given: Collection[str] = ()) -> None:
    """Refuses further heads where nothing is trained, or for rows that are not asked for."""
    if c.mtp_rows and not c.steps:
        raise InputError(
            "--config.mtp_rows: further heads are of training alone; give --config.steps too"
        )
    for rows in c.mtp_rows:
        if rows not in c.rows:
            raise InputError(f"--config.mtp_rows holds {rows!r}; {closest(rows, c.rows)}")


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
    done = {tuple(row[name] for name in (*CELL, *IDENTITY)) for row in out.rows()}
    visits = visits_of(c)
    with Progress(len(visits), label="vocabularies") as progress:
        for count, (cell, all_steps) in enumerate(visits, 1):
            missing: dict[int, dict[tuple[str, int], str]] = {}
            for steps in all_steps:
                missing[steps] = {
                    (language, number): text
                    for language, of_language in held_out.items()
                    for number, text in enumerate(of_language)
                    if (*cell, steps, language, number) not in done
                }
            if any(missing.values()):
                for steps, model in models(c, lm, cell, sample, missing):
                    for (language, number), text in missing[steps].items():
                        yield {
                            "model": c.model, **dict(zip(CELL, cell, strict=True)),
                            "steps": steps, "language": language, "document": number,
                            **measure(model, text),
                        }  # fmt: skip
            progress.update(count)


# --- Models ---------------------------------------------------------------------------------------

Cell = tuple[int, str, int, int]  # new tokens, rows, seed, further heads


def visits_of(c: ConfigDict) -> list[tuple[Cell, tuple[int, ...]]]:
    """Models and the steps of training after which they are measured: all of them before any, and
    then each with its training. Further heads change nothing before it; the model without new
    tokens is not trained.
    """
    cells = [
        (tokens, rows, seed, mtp_heads)
        for tokens in c.tokens
        for rows in c.rows
        for seed in range(c.replicates if rows == "random" else 1)
        for mtp_heads in ((0, c.mtp_heads) if rows in c.mtp_rows else (0,))
    ]
    before = [(0, NONE, 0, 0), *(cell for cell in cells if not cell[-1])]
    return [(cell, (0,)) for cell in before] + [(cell, c.steps) for cell in cells if c.steps]


def models(
    c: ConfigDict, lm: LM, cell: Cell, sample: Sequence[str], missing: Mapping[int, Mapping]
) -> Iterator[tuple[int, LM]]:
    """(steps, model) of a cell, wherever something is to be measured."""
    tokens, rows, seed, mtp_heads = cell
    model = lm if rows == NONE else expand_vocab(lm, sample, tokens=tokens, rows=rows, seed=seed)
    if missing.get(0):
        yield 0, model
    steps = [count for count, texts in missing.items() if count and texts]
    if steps:
        trained = train(c, model, sample, mtp_heads=mtp_heads, steps=steps)
        yield from ((count, trained[count]) for count in steps)


def train(
    c: ConfigDict, model: LM, sample: Sequence[str], *, mtp_heads: int, steps: Sequence[int]
) -> dict[int, LM]:
    """The model after each of so many steps of one training."""
    outer = OuterLayers(model.spec, c.layers)
    loss = MultiToken(outer, mtp_heads) if mtp_heads else outer
    params, rest = loss.split(model.params)
    text = np.concatenate([model.tokenizer.encode(page) for page in sample])
    data = RandomWindows(text, length=c.length, rows=c.batch, seed=c.seed)
    trained: dict[int, LM] = {}

    def watch(done, params):
        if done in steps:
            copied = jax.tree.map(jnp.array, loss.join(params, rest))
            trained[done] = dataclasses.replace(model, params=copied)

    with Progress(max(c.steps), label="training on plain text") as progress:
        frozen.fit(
            lambda step: loss, params, rest, data.batch,
            optimizer=optimizer_of(c.optimizer),
            schedule=parse_choice(c.schedule, SCHEDULES, what="schedule"), steps=max(c.steps),
            progress=progress.update, watch=watch,
        )  # fmt: skip
    return trained


@functools.cache
def optimizer_of(text: str) -> optax.GradientTransformation:
    """The same one for the same text: a step is compiled for its optimizer."""
    return parse_choice(text, OPTIMIZERS, what="optimizer").build()


def measure(lm: LM, text: str) -> Row:
    """Loss and length of a text, by its characters: vocabularies differ in what a token is."""
    nll, tokens = lm.nll(text), lm.count_tokens(text)
    return {
        "bits_per_character": nll.bits_per_byte * len(text.encode()) / len(text),
        "characters_per_token": len(text) / tokens,
        "tokens_per_sentence": tokens / sentences(text),
    }


def sentences(text: str) -> int:
    return sum(bool(part.strip()) for part in re.split(SENTENCE_END, text))


# --- What is shown --------------------------------------------------------------------------------

VERSION = ("tokens", "rows", "mtp_heads", "steps")


def summary(rows: list[Row]) -> list[Row]:
    """A version of the model and a language a line: means over documents with intervals."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row["language"], *(row[name] for name in VERSION))
        groups.setdefault(key, []).append(row)
    return [
        {
            "language": language, "version": tuple(version), "group": group,
            "bits": score.over_documents(list(of_documents(group).values())),
            "tokens_per_sentence": mean_of(group, "tokens_per_sentence"),
            "characters_per_token": mean_of(group, "characters_per_token"),
        }
        for (language, *version), group in groups.items()
    ]  # fmt: skip


def mean_of(group: list[Row], name: str) -> float:
    return sum(row[name] for row in group) / len(group)


def of_documents(group: list[Row]) -> dict[int, float]:
    """Bits per character of each document: the mean over seeds."""
    values: dict[int, list[float]] = {}
    for row in group:
        values.setdefault(row["document"], []).append(row["bits_per_character"])
    return {number: sum(each) / len(each) for number, each in values.items()}


def table(rows: list[Row]) -> list[Row]:
    """Bits per character with 95 % intervals over documents. Differences are paired: to the model
    without new tokens, and of rows with further heads to the same without.
    """
    lines = {(line["language"], *line["version"]): line for line in summary(rows)}
    base, control_base = (lines[language, 0, NONE, 0, 0] for language in ("target", "other"))
    table_rows = []
    for (language, *version), line in lines.items():
        control = lines.get(("other", *version))
        if language != "target" or control is None:
            continue
        tokens, kind, mtp_heads, steps = version
        row: Row = {"new tokens": tokens, "rows": kind, "steps": steps}
        if any(each["mtp_heads"] for each in rows):
            row["MTP heads"] = mtp_heads
        row |= {
            "documents": len(of_documents(line["group"])),
            "characters a token": f"{line['characters_per_token']:.2f}",
            "tokens a sentence": f"{line['tokens_per_sentence']:.1f}",
            "bits/character": score.value_text(line["bits"]),
            "above the model without": above(line, base),
            "other language": score.value_text(control["bits"]),
            "other, above": above(control, control_base),
        }
        without = lines.get((language, tokens, kind, 0, steps))
        if mtp_heads and without is not None:
            row["above without heads"] = above(line, without)
        table_rows.append(row)
    return table_rows


def above(line: Row, base: Row) -> str | None:
    if line is base:
        return None
    values, of_base = of_documents(line["group"]), of_documents(base["group"])
    differences = [values[number] - of_base[number] for number in values if number in of_base]
    return score.value_text(score.over_documents(differences)) if differences else None


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """In the language of the new tokens: means and documents before training, and means by the
    steps of training.
    """
    target = [row for row in rows if row["language"] == "target"]
    before = [
        {**row, "added": f"{row['tokens']:,} new tokens" if row["tokens"] else "as it is"}
        for row in target if not row["steps"]
    ]  # fmt: skip
    y_label = "loss (bits/character)"
    figures = {"vocab_expansion": plots.bars(
        before, x="added", y="bits_per_character", by="rows", center=np.mean, x_label="",
        y_label=y_label,
    )}  # fmt: skip
    trained = [line for line in summary(target) if line["version"][-1]]
    if trained:
        # Before training, further heads change nothing: such lines begin where the others do.
        names = {line["version"][:-1]: name_of(line) for line in trained}
        figures["vocab_expansion_training"] = plots.curves(
            [{"line": name, "steps": line["version"][-1], "bits": line["bits"].mean}
             for (tokens, rows, mtp_heads), name in names.items() for line in summary(target)
             if line["version"][:-1] == (tokens, rows, mtp_heads)
             or line["version"] == (tokens, rows, 0, 0)],
            x="steps", y="bits", by="line", x_label="training (steps)", y_label=y_label,
        )  # fmt: skip
    return figures


def name_of(line: Row) -> str:
    _, rows, mtp_heads, _ = line["version"]
    return f"{rows}, {mtp_heads} MTP" if mtp_heads else rows


if __name__ == "__main__":
    main(
        run, plot, table=table, resumes=True, check=check, may_change=("tokens", "rows", "mtp_rows")
    )
