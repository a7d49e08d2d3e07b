"""Many-shot in-context learning with many labels, by rounds of examples, policy and place.

A prompt holds rounds of one example of each label; all of its labels are asked for, so that one
reading answers as many questions. Labels begin with different tokens, so the likeliest first token
among theirs tells the answer: what decoding that is restricted to the labels writes. Models prefer
some labels whatever is asked; calibrated answers divide by that (Zhou et al. 2024,
arXiv:2309.17249): by the mean probability of a label over the questions of a prompt.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.config import closest
from lminf.errors import InputError
from lminf.evals import score
from lminf.evals.suites import many_shot
from lminf.evals.suites.many_shot import Example
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

QUARTERS = (1, 2, 3, 4)  # of the examples; where the last one with the tool asked for stands
CANDIDATES = 8  # drawn for each label, of which some begin with the token of another


class Drawn(NamedTuple):
    """The examples of one document, and what is asked about them."""

    names: Sequence[str]  # of the labels
    lead: Sequence[int]  # tokens with which all names begin
    firsts: Sequence[int]  # the token of each name after these: no two are the same
    examples: Sequence[Example]  # in rounds
    tools: Sequence[str]  # that the question about each label names


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    for order in c.orders:
        if order not in (orders := get_args(many_shot.Order)):
            raise InputError(f"there is no order {order!r}; {closest(order, orders)}")
    lm = _models.load(c.model, seed=c.seed, dtype=c.dtype)
    models = [lm.with_policy(parse_policy(text)) for text in c.policies]
    done = {identity(row) for row in out.rows()}
    prompts = list(itertools.product(range(c.documents), c.rounds, c.orders, models))
    with Progress(len(prompts), label="prompts", unit="prompts") as progress:
        for count, (number, rounds, order, model) in enumerate(prompts, 1):
            cell = {"policy": model.policy.name, "rounds": rounds, "order": order,
                    "document": number}  # fmt: skip
            if not all((*cell.values(), quarter) in done for quarter in QUARTERS):
                for row in measure(model, drawn(c, lm, number), rounds, order):
                    if identity(row := {"model": c.model, **cell, **row}) not in done:
                        yield row
            progress.update(count)


def identity(row: Row) -> tuple:
    """What tells a row from others of the run."""
    return tuple(row[name] for name in ("policy", "rounds", "order", "document", "quarter"))


def drawn(c: ConfigDict, lm: LM, number: int) -> Drawn:
    """A document, the same for every policy, order and number of rounds."""
    random = np.random.default_rng((c.seed, number))
    names, lead, firsts = told_apart(lm, many_shot.sample_labels(random, CANDIDATES * c.labels))
    if len(names) < c.labels:
        raise InputError(
            f"the tokenizer of {c.model} begins many labels with the same token, so only "
            f"{len(names)} can be told apart by it; give --config.labels={len(names)} or fewer"
        )
    tools = many_shot.sample_tools(random, c.labels, c.text)
    rounds = many_shot.sample_examples(random, tools)
    examples = list(itertools.islice(rounds, max(c.rounds) * c.labels))
    of_first = {example.label: example.tool for example in examples[: c.labels]}
    tools_asked = [of_first[label] for label in range(c.labels)]
    return Drawn(names[: c.labels], lead, firsts[: c.labels], examples, tools_asked)


def told_apart(lm: LM, names: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """The names that differ from those before them in the first token that is not common to all;
    the common tokens, and that token of each.
    """
    encoded = [lm.encode_continuation("Label:", f" {name}") for name in names]
    tokens = [ids[start:].tolist() for ids, start in encoded]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False))
    lead = [column[0] for column in columns]
    by_first: dict[int, str] = {}
    for name, ids in zip(names, tokens, strict=True):
        by_first.setdefault(ids[len(lead)], name)
    return list(by_first.values()), lead, list(by_first)


def measure(lm: LM, document: Drawn, rounds: int, order: many_shot.Order) -> Iterator[Row]:
    """A row for each quarter of the examples."""
    started, labels = time.perf_counter(), len(document.names)
    examples = many_shot.order_examples(document.examples[: rounds * labels], order)
    shots = many_shot.format_examples(examples, document.names)
    prompts = [
        np.append(lm.encode(shots + many_shot.format_question(tool))[0], document.lead).astype(
            np.int32
        )
        for tool in document.tools
    ]
    # [labels asked for, labels]
    log_probs = SharedPrefix(lm).next(prompts)[:, list(document.firsts)].astype(np.float64)
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    preference = np.logaddexp.reduce(log_probs, axis=0) - np.log(labels)
    answers = log_probs.argmax(1)
    right = answers == np.arange(labels)
    calibrated = (log_probs - preference).argmax(1) == np.arange(labels)
    place = {example.tool: index for index, example in enumerate(examples)}
    last = {example.label: index for index, example in enumerate(examples)}

    def quarters_of(places: Sequence[int]) -> np.ndarray:
        return np.array(places) * len(QUARTERS) // len(examples) + 1

    relevant = quarters_of([place[tool] for tool in document.tools])
    answered = quarters_of([last[label] for label in answers])
    seconds = (time.perf_counter() - started) / len(QUARTERS)
    for quarter in QUARTERS:
        members = relevant == quarter
        yield {
            "quarter": quarter,
            "labels": labels,
            "length": max(map(len, prompts)),
            "questions": int(members.sum()),
            "right": int(right[members].sum()),
            "right_calibrated": int(calibrated[members].sum()),
            "answers_from_here": int((answered == quarter).sum()),
            "trained_length": lm.spec.trained_length,
            "seconds": seconds,
        }


# --- What is shown --------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> list[Row]:
    """A number of rounds, order and policy a line: means over documents with 95 % intervals."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["order"], row["rounds"], row["policy"]), []).append(row)
    return [
        {
            "order": order, "rounds": rounds, "policy": policy,
            "labels": group[0]["labels"], "length": group[0]["length"],
            "documents": len({row["document"] for row in group}),
            "accuracy": share(group, "right"),
            "calibrated": share(group, "right_calibrated"),
            "by_quarter": {
                quarter: share(members, "right_calibrated") for quarter in QUARTERS
                if (members := [row for row in group if row["quarter"] == quarter
                                and row["questions"]])
            },
            "from_last": share([{**row, "answers_from_here": row["answers_from_here"] *
                                 (row["quarter"] == QUARTERS[-1])} for row in group],
                               "answers_from_here"),
        }
        for (order, rounds, policy), group in groups.items()
    ]  # fmt: skip


def share(rows: Sequence[Row], column: str) -> score.Interval:
    """The share of the questions of each document that `column` counts: the mean over documents."""
    documents: dict[int, list[Row]] = {}
    for row in rows:
        documents.setdefault(row["document"], []).append(row)
    return score.over_documents([
        sum(row[column] for row in each) / sum(row["questions"] for row in each)
        for each in documents.values()
    ])  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Accuracies with their 95 % intervals over documents; chance is one in as many labels. The
    last column tells a preference for late labels from knowledge of them.
    """
    return [
        {
            "order": line["order"],
            "rounds": line["rounds"],
            "policy": line["policy"],
            "tokens": line["length"],
            "documents × labels": f"{line['documents']} × {line['labels']}",
            "chance": f"{1 / line['labels']:.2f}",
            "accuracy": score.value_text(line["accuracy"]),
            "calibrated": score.value_text(line["calibrated"]),
            **{f"quarter {q}": score.value_text(line["by_quarter"][q])
               if q in line["by_quarter"] else None for q in QUARTERS},
            "answers from quarter 4": score.value_text(line["from_last"]),
        }
        for line in summary(rows)
    ]  # fmt: skip


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Calibrated accuracy by tokens of the prompt with chance, and by where the example stands."""
    lines = summary(rows)
    names = style.short_names(dict.fromkeys(line["policy"] for line in lines))
    short = {policy: name.replace("\n", ", ") for policy, name in names.items()}
    points = [
        {"panel": f"examples {line['order']}", "policy": short[line["policy"]], **line_of(line)}
        for line in lines
    ]
    points += [
        {**point, "policy": "chance", "value": 1 / line["labels"], "low": None, "high": None}
        for point, line in zip(points, lines, strict=True)
        if line["policy"] == lines[0]["policy"]
    ]
    cells = [
        {"quarter": ("first", "second", "third", "last")[quarter - 1], "accuracy": interval.mean,
         "line": f"{short[line['policy']]}, {line['order']}, {line['rounds']} of each"}
        for line in sorted(lines, key=lambda line: line["order"])
        for quarter, interval in line["by_quarter"].items()
    ]  # fmt: skip
    return {
        "long_icl": plots.curves(
            points, x="length", y="value", by="policy", panel="panel", log_x=True,
            interval=("low", "high"), y_limits=(-0.02, None), x_label="prompt (tokens)",
            y_label="calibrated accuracy (95 %)",
        ),
        "places": plots.heatmap(
            cells, x="quarter", y="line", value="accuracy", limits=(0, None), y_label="",
            x_label="quarter of the examples that the relevant one stands in",
            value_label="calibrated accuracy",
        ),
    }  # fmt: skip


def line_of(line: Row) -> Row:
    """The point of a curve."""
    interval = line["calibrated"]
    return {"length": line["length"], "value": interval.mean, **score.ends(interval)}


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("documents", "policies", "rounds"))
