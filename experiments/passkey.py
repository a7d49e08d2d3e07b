"""Passkey retrieval by prompt length, depth of the key and policy."""

import time
from collections.abc import Iterator
from typing import get_args

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import AnyPolicy
from lminf.config import closest
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import passkey, score
from lminf.evals.passkey import Sample
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.lm import prefix
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

TOGETHER = 8192  # prompt tokens read side by side: more of them is no faster on a CPU


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
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

        def show(tokens):
            nonlocal read
            read += tokens
            progress.update(read)

        for model, length, depth, samples in missing:
            started = time.perf_counter()
            # Prompts of a cell differ from the key on: what stands before it is read once.
            answers = prefix.generate(
                model,
                [sample.prompt for sample in samples],
                max_new_tokens=passkey.ANSWER_TOKENS,
                rows=max(1, TOGETHER // length),
                progress=show,
            )
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


def in_window(policy: AnyPolicy, sample: Sample) -> bool:
    """Whether the line with the key is seen at its true distance until the answer is given."""
    width = policy.window
    return width is None or sample.tokens + passkey.ANSWER_TOKENS - sample.key_at <= width


def plot(rows: list[Row]) -> Figure:
    """Share found by length, with Wilson intervals: keys a policy's window reaches, and others."""
    lines = over_depths(rows)
    # Most values are 0 or 1: a little sideways, no interval hides another.
    places = list(dict.fromkeys(row["policy"] for row in lines))
    step = max((row["length"] for row in lines), default=0) / 120
    shown = [
        {
            **row,
            "panel": f"Keys {row['place']}",
            "length": row["length"] + step * (places.index(row["policy"]) - len(places) // 2),
        }
        for row in lines
    ]
    return plots.curves(
        shown, x="length", y="accuracy", by="policy", panel="panel",
        mark=rows[0]["trained_length"], interval=("low", "high"),
        x_label="prompt (tokens)", y_label="keys found (share, 95 % interval)",
        y_limits=(-0.04, 1.04),
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Keys found with the interval of their share; a policy and place of the key a line, a length
    a column.
    """
    shown = [
        {
            "policy": row["policy"],
            "length": row["length"],
            "key": row["place"],
            "found": f"{row['correct']}/{row['prompts']} ({row['low']:.2f}–{row['high']:.2f})",
        }
        for row in over_depths(rows)
    ]
    lines = []
    for policy, place in dict.fromkeys((row["policy"], row["key"]) for row in shown):
        own = [row for row in shown if (row["policy"], row["key"]) == (policy, place)]
        for line in tables.pivot(own, index="policy", columns="length", value="found"):
            lines.append({"policy": policy, "key": place, **line})
    return lines


INSIDE, OUTSIDE = "inside what the policy sees", "outside its window"


def over_depths(rows: list[Row]) -> list[Row]:
    """Rows of one policy and length as one, but keys inside and outside its window apart."""
    groups: dict = {}
    for row in rows:
        place = INSIDE if row["key_in_window"] else OUTSIDE
        groups.setdefault((row["policy"], place, row["length"]), []).append(row)
    lines = []
    for (policy, place, length), group in groups.items():
        correct, prompts = (sum(row[name] for row in group) for name in ("correct", "prompts"))
        rate, low, high = score.success_rate(correct, prompts)
        lines.append({
            "policy": policy, "place": place, "length": length, "accuracy": rate, "low": low,
            "high": high, "correct": correct, "prompts": prompts,
        })  # fmt: skip
    return lines


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
