"""Passkey retrieval by prompt length, depth of the key and policy."""

from collections.abc import Iterator

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.evals import score
from lminf.evals.passkey import Passkey
from lminf.experiments import _evals, _models
from lminf.experiments._main import main
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    policies = [parse_policy(text) for text in c.policies]
    tasks = [Passkey(c.generator, depth) for depth in c.depths]
    cells = _evals.cells(tasks, c.lengths, c.prompts)
    lm = _models.load(c.model, seed=c.seed)
    subjects = [_evals.subject(c, lm.with_policy(policy)) for policy in policies]
    yield from _evals.measure(c, out, lm, subjects, cells)


def plot(rows: list[Row]) -> Figure:
    """Share found by length, with Wilson intervals: keys a policy's window reaches, and others."""
    lines = over_depths(rows)
    # Most values are 0 or 1: a little sideways, no interval hides another.
    policies = list(dict.fromkeys(row["policy"] for row in lines))
    step = max((row["length"] for row in lines), default=0) / 120
    shifted = [
        {
            **row,
            "panel": f"Keys {row['key']}",
            "length": row["length"] + step * (policies.index(row["policy"]) - len(policies) // 2),
        }
        for row in lines
    ]
    return plots.curves(
        shifted, x="length", y="score", by="policy", panel="panel",
        mark=rows[0]["trained_length"], interval=("low", "high"),
        x_label="prompt (tokens)", y_label="keys found (share, 95 % interval)",
        y_limits=(-0.04, 1.04),
    )  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Keys found with the interval of their share; a policy and place of the key a line, a length
    a column.
    """
    lines = [{**row, "found": score.interval_text(row)} for row in over_depths(rows)]
    groups = dict.fromkeys((row["policy"], row["key"]) for row in lines)
    return [
        {"policy": policy, "key": key, **line}
        for policy, key in groups
        for line in tables.pivot(
            [row for row in lines if (row["policy"], row["key"]) == (policy, key)],
            index="policy", columns="length", value="found",
        )
    ]  # fmt: skip


def over_depths(rows: list[Row]) -> list[Row]:
    """Rows of one policy and length as one, but keys inside and outside its window apart."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    keyed = [
        {**row, "key": _evals.INSIDE if row["key_in_window"] else _evals.OUTSIDE}
        for row in sorted(rows, key=lambda row: policies.index(row["policy"]))
    ]
    return score.pooled(keyed, ("policy", "key", "length"))


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
