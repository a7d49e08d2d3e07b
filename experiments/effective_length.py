"""Tasks of the evaluation suite by prompt length, level of difficulty and policy."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.evals.runner import Subject
from lminf.evals.suites import catalog, summary
from lminf.experiments import _evals, _models
from lminf.experiments._main import main
from lminf.lm.chat import ChatModel
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder

MAY_CHANGE = ("tasks", "policies", "lengths")  # of a run that goes on: each cell is by itself
RATE = "instruction_following_rate"  # a column of Ada-LEval's tasks
QUARTERS = [(scope, diffusion) for scope in ("low", "high") for diffusion in ("low", "high")]


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    tasks = [task for text in c.tasks for task in catalog.parse(text)]
    policies = [parse_policy(text) for text in c.policies]
    cells = _evals.cells(tasks, c.lengths, [c.instances] * len(c.lengths))
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)

    def facts(model: LM, length: int, instances: Sequence[Any]) -> Mapping[str, Any]:
        return {
            "trained_length": lm.spec.trained_length,
            **_evals.costs(model, length),
            "mean_tokens": sum(each.tokens for each in instances) / len(instances),
            "cut_prompts": sum(getattr(each, "cut", 0) > 0 for each in instances),
        }

    models = [SharedPrefix(lm.with_policy(policy)) for policy in policies]
    chats = [ChatModel(model) for model in models] if c.chat else []
    subjects = [
        Subject(
            model, {"model": c.model, "policy": policy.name, **({"chat": True} if c.chat else {})},
            partial(facts, lm.with_policy(policy)), ends_answers=c.chat,
        )
        for model, policy in zip(chats or models, policies, strict=True)
    ]  # fmt: skip
    encode = chats[0].encode if chats else None
    for row in _evals.measure(c, out, lm, subjects, cells, encode=encode):
        kind = catalog.TASKS[row["task"]]
        yield {**row, "scope": kind.scope, "diffusion": kind.diffusion}


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Scores by length, a panel a task; for every task with levels, a map of length and level."""
    figures, rows = {}, told_apart(rows)
    names = dict.fromkeys(row["policy"] for row in rows)
    short = {name: each.replace("\n", ", ") for name, each in style.short_names(names).items()}
    pooled = over_levels(rows)
    if len({row["length"] for row in rows}) > 1:
        figures["scores"] = plots.curves(
            pooled, x="length", y="score", by="policy", panel="task", interval=("low", "high"),
            log_x=True, mark=rows[0]["trained_length"], y_limits=(-0.04, 1.04),
            x_label="prompt (tokens)", y_label="score (95 % interval)",
        )  # fmt: skip
    elif len({row["task"] for row in rows}) > 1:
        figures["scores"] = plots.heatmap(
            [{**row, "line": short[row["policy"]]} for row in pooled],
            x="task", y="line", value="score", limits=(0, 1), x_label="", y_label="",
        )  # fmt: skip
    else:
        kept = {row["policy"]: f"{row['cache_bytes'] / 1e6:.0f} MB" for row in rows}
        figures["scores"] = plots.bars(
            [{**row, "bar": f"{short[row['policy']]}, {kept[row['policy']]}"} for row in pooled],
            x="bar", y="score", interval=("low", "high"), x_label="",
            y_label=f"score of {rows[0]['task']} at {rows[0]['length']:,} tokens (95 % interval)",
        )  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        level = level_of(task)
        if level is None or len({row[level] for row in of_task}) < 2:
            continue
        cells = [{**row, "line": f"{short[row['policy']]}, {level} {row[level]}",
                  "written": f"{row['score']:.2f}"} for row in of_task]  # fmt: skip
        cells.sort(key=lambda row: list(names).index(row["policy"]))
        figures[re.sub(r"\W+", "_", task)] = plots.heatmap(
            cells, x="length", y="line", value="score", limits=(0, 1), text="written",
            x_label="prompt (tokens)", y_label="", value_label="score", title=task,
        )  # fmt: skip
    return figures


def table(rows: list[Row]) -> list[Row]:
    """A task and policy a line, by scope and diffusion: what a query attends to and what is kept
    after a prompt of the longest length, scores by length, and the longest length that is answered
    as well as the shortest. Where a task reports it, also the share of answers in the form that was
    asked for.
    """
    lines, rows = [], told_apart(rows)
    lengths = sorted({row["length"] for row in rows})
    has_rate = any(RATE in row for row in rows)
    for scope, diffusion in QUARTERS:
        quarter = [row for row in rows if (row["scope"], row["diffusion"]) == (scope, diffusion)]
        for task in dict.fromkeys(row["task"] for row in quarter):
            for policy in dict.fromkeys(row["policy"] for row in rows):
                scored = [row for row in quarter if (row["task"], row["policy"]) == (task, policy)]
                cells = {row["length"]: row for row in over_levels(scored)}
                if scored:
                    longest = max(scored, key=lambda row: row["length"])
                    lines.append({
                        "scope": scope, "diffusion": diffusion, "task": task, "policy": policy,
                        "attended": longest["attended"],
                        "kept (MB)": round(longest["cache_bytes"] / 1e6, 1),
                        **{f"{length:,}": text_of(cells.get(length)) for length in lengths},
                        "instances": sum(row["instances"] for row in scored),
                        "effective length": summary.effective_length(scored),
                        **({"instruction following": followed(scored)} if has_rate else {}),
                    })  # fmt: skip
    return lines


def text_of(row: Row | None) -> str:
    return f"{row['score']:.2f} ({row['low']:.2f}–{row['high']:.2f})" if row else "–"


def followed(rows: list[Row]) -> float | None:
    """The share of the answers of all rows from which an answer could be extracted."""
    rated = [row for row in rows if RATE in row]
    instances = sum(row["instances"] for row in rated)
    return sum(row[RATE] * row["instances"] for row in rated) / instances if rated else None


def over_levels(rows: list[Row]) -> list[Row]:
    """One row for each task, policy and length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["policy"], row["length"]), []).append(row)
    return [
        {"task": task, "policy": policy, "length": length,
         **dict(zip(("score", "low", "high"), summary.interval(group), strict=True))}
        for (task, policy, length), group in groups.items()
    ]  # fmt: skip


def told_apart(rows: list[Row]) -> list[Row]:
    """The rows, in which tasks that were asked in several ways have the fields that differ in their
    names: answers that are written and chosen are no instances of one score. Levels are none.
    """
    values: dict[tuple[str, str], set[Any]] = {}
    for row in rows:
        for name in asked_by(row["task"]):
            values.setdefault((row["task"], name), set()).add(row.get(name))

    def named(row: Row) -> str:
        task = row["task"]
        differ = [name for name in asked_by(task) if len(values[task, name]) > 1]
        fields = ",".join(f"{name}={row.get(name)}" for name in differ)
        return f"{task}:{fields}" if fields else task

    return [{**row, "task": named(row)} for row in rows]


def asked_by(task: str) -> list[str]:
    """The fields of the task that are no level."""
    kind = catalog.TASKS.get(task)
    fields = dataclasses.fields(kind) if kind else ()
    return [field.name for field in fields if field.name != level_of(task)]


def level_of(task: str) -> str | None:
    """The field of the task that says how hard it is."""
    kind = catalog.TASKS.get(task.split(":")[0])
    return kind.levels[0] if kind is not None and kind.levels else None


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=MAY_CHANGE)
