"""Time per token and bytes of cache at positions of a stream, by policy.

The tokens before are not read: `_streams` says why they need not be. Cells are timed in turn, one
token of each, so that other work on the machine slows all of them alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.errors import InputError
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.experiments._streams import Stream, step_times
from lminf.models import cost
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

# What a token that is written has to visit after n others, in keys; settings by their names, of
# several the first as k₁. Sources: docs/policies.md.
VISITED = {
    "full": "n",
    "window": "window",
    "lm_infinite": "window + sinks",
    "streaming": "window + sinks",
    "topk": "n",
    "infllm": "window + sinks + topk · block + n / block",
    "longheads": "attended + n / chunk",
    "hip": "topk · log(n / topk) + window + sinks; n in dense layers",
    "infinite_hip": "n · log(chunk₁) / chunk₁ every refresh₁; topk + window + sinks",
    "sirllm": "capacity",
    "h2o": "capacity",
    "tova": "capacity",
}


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    timed = [
        (policy, position)
        for policy in map(parse_policy, c.policies)
        for position in c.positions
        if policy.bounded or position <= c.unbounded_to
    ]
    if not timed:
        raise InputError(
            f"--config.unbounded_to={c.unbounded_to}: all of these policies keep something of "
            f"every token, and all positions are past it; give a smaller position"
        )
    lm = _models.load(c.model, seed=c.seed)
    cells = [
        Stream(lm.with_policy(policy), position, room=max(c.steps + 1, c.chunk))
        for policy, position in timed
    ]
    sizes = [cell.bytes for cell in cells]
    times = step_times(cells, c.steps)
    reading = read_times(cells, c.chunk) if c.chunk else [None] * len(cells)
    for cell, size, read, (low, median, high) in zip(cells, sizes, reading, times, strict=True):
        yield {
            "model": c.model,
            "trained_length": lm.spec.trained_length,
            "policy": cell.lm.policy.name,
            "position": cell.position,
            "ms_per_token": median,
            "low": low,
            "high": high,
            "tokens_per_s": 1e3 / median,
            **({"read_ms_per_token": 1e3 * read / c.chunk} if c.chunk else {}),
            "cache_bytes": size,
            "planned_bytes": cost.cache_bytes(
                lm.spec, cell.lm.decoder.policies, tokens=cell.capacity, dtype=lm.dtype
            ),
            "steps": c.steps,
            "chunk": c.chunk,
        }


def read_times(cells: Sequence[Stream], chunk: int) -> Float[np.ndarray, " cells"]:
    """Seconds that each takes to read a chunk, the better of two."""
    with Progress(3, label="reading", unit="chunks of each") as progress:
        chunks = []
        for done in range(3):
            chunks.append([cell.read(chunk) for cell in cells])
            progress.update(done + 1)
    return np.min(chunks[1:], axis=0)  # the first of each compiles


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    shown = [{**row, "cache_mib": row["cache_bytes"] / 2**20} for row in rows]
    common = {"x": "position", "by": "policy", "log_x": True, "log_y": True,
              "x_label": "text before the token (tokens)"}  # fmt: skip
    return {
        "decode_cost": plots.curves(
            shown, y="ms_per_token", y_label="time per token (ms)", interval=("low", "high"),
            **common,
        ),
        "cache_bytes": plots.curves(
            shown, y="cache_mib", y_label="keys and values (MiB)", **common
        ),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """Milliseconds per token, then MiB of cache; a policy a line, a position a column. Beside them
    what a token visits, and the exponent of n between the two farthest positions.
    """
    mib = [{**row, "cache": row["cache_bytes"] / 2**20} for row in rows]
    parts = {"ms_per_token": "ms/token", "cache": "MiB", "read_ms_per_token": "ms/token, reading"}
    return [
        {
            **line,
            "policy": f"{line['policy']}, {unit}",
            "exponent": exponent(mib, line["policy"], value),
            "visits": VISITED.get(line["policy"].partition(":")[0]) if unit != "MiB" else None,
        }
        for value, unit in parts.items()
        for line in tables.pivot(mib, index="policy", columns="position", value=value)
    ]


def exponent(rows: list[Row], policy: str, value: str) -> float | None:
    """b of value = a n^b through the two farthest positions that were measured; None with one."""
    points = sorted((r["position"], r[value]) for r in rows
                    if r["policy"] == policy and r.get(value) is not None)  # fmt: skip
    if len(points) < 2:
        return None
    (n, low), (m, high) = points[-2:]
    return math.log(high / low) / math.log(m / n)


if __name__ == "__main__":
    main(run, plot, table=table)
