"""Passkey retrieval by prompt length, depth of the key and policy."""

import time
from typing import get_args

from experiments import _models
from experiments._main import main
from lminf.attention.parsing import parse_policy
from lminf.config import closest
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import passkey, score
from lminf.run import plots, tables
from lminf.run.progress import Progress

TOGETHER = 8192  # prompt tokens read side by side: more of them is no faster on a CPU


def run(c, out):
    policies = [parse_policy(text) for text in c.policies]
    if len(c.prompts) != len(c.lengths):
        raise InputError(
            f"prompts={c.prompts} for lengths={c.lengths}; give one number of prompts per length"
        )
    generators = get_args(passkey.Generator)
    if c.generator not in generators:
        raise InputError(
            f"there is no generator {c.generator!r}; {closest(c.generator, generators)}"
        )
    lm = _models.load(c.model, seed=c.seed)
    models = [lm.with_policy(policy) for policy in policies]  # refuses bad windows at once

    def draw(length, count):
        """Prompts at every depth, new keys in each cell, the same for every policy."""
        return {
            depth: passkey.draw(
                c.generator, lambda text: lm.encode(text)[0], length=length, count=count,
                seed=(c.seed, length, index), depth=depth,
            )
            for index, depth in enumerate(c.depths)
        }  # fmt: skip

    cells = [
        (length, depth, samples)
        for length, count in zip(c.lengths, c.prompts, strict=True)
        for depth, samples in draw(length, count).items()
    ]
    done = {(row["policy"], row["length"], row["depth"]) for row in out.rows()}
    missing = [
        (model, *cell)
        for model in models
        for cell in cells
        if (model.policy.name, *cell[:2]) not in done
    ]
    total = sum(sample.tokens for *_, samples in missing for sample in samples)
    with Progress(total, label="passkey", unit="tokens") as progress:
        read = 0
        for model, length, depth, samples in missing:
            started = time.perf_counter()
            answers = []
            for batch in batches(samples, max(1, TOGETHER // length)):
                answers += model.generate(
                    [sample.prompt for sample in batch], max_new_tokens=passkey.ANSWER_TOKENS
                )
                read += sum(sample.tokens for sample in batch)
                progress.update(read)
            correct = sum(map(passkey.Sample.correct, samples, answers))
            accuracy, low, high = score.success_rate(correct, len(samples))
            yield {
                "model": c.model,
                "trained_length": lm.spec.trained_length,
                "generator": c.generator,
                "prompts_digest": sources.digest("\0".join(s.prompt for s in samples)),
                "policy": model.policy.name,
                "length": length,
                "depth": depth,
                "key_in_window": all(in_window(model.policy, sample) for sample in samples),
                "prompts": len(samples),
                "correct": correct,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "seconds": time.perf_counter() - started,
            }


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_window(policy, sample) -> bool:
    """Whether the line with the key is seen at its true distance until the answer is given."""
    width = policy.window
    return width is None or sample.tokens + passkey.ANSWER_TOKENS - sample.key_at <= width


def plot(rows):
    """Accuracy by length; where a policy has a window, keys inside and outside it apart."""
    lines = over_depths(rows)
    names = list(dict.fromkeys(row["asked"] for row in lines))
    # Most values are 0 or 1: a little sideways, no line hides another.
    shown = [
        {
            **row,
            "asked": row["asked"].replace(":", "\n").replace(", ", "\n"),
            "length": row["length"] * 1.012 ** (names.index(row["asked"]) - len(names) / 2),
        }
        for row in lines
    ]
    return plots.curves(
        shown, x="length", y="accuracy", by="asked", mark=rows[0]["trained_length"],
        x_label="prompt (tokens)", y_label="share of keys found", y_limits=(-0.04, 1.04),
    )  # fmt: skip


def table(rows):
    """Share of keys found; a policy and place of the key a line, a length a column."""
    return tables.pivot(over_depths(rows), index="asked", columns="length", value="accuracy")


def over_depths(rows):
    """Rows of one policy and length as one, but keys inside and outside its window apart."""
    windowed = {row["policy"] for row in rows if not row["key_in_window"]}
    groups: dict = {}
    for row in rows:
        place = f", key {'inside' if row['key_in_window'] else 'outside'} its window"
        asked = row["policy"] + (place if row["policy"] in windowed else "")
        groups.setdefault((asked, row["length"]), []).append(row)
    return [
        {
            "asked": asked,
            "length": length,
            "accuracy": sum(r["correct"] for r in group) / sum(r["prompts"] for r in group),
        }
        for (asked, length), group in groups.items()
    ]


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
