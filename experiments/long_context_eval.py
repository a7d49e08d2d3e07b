"""What policies that choose by content find outside their window, beside those that forget it.

Every cell has keys of its own. What the prompts of a task and length begin with alike, each policy
reads once (`lminf.lm.prefix`).
"""

import statistics
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.config import parse_choice
from lminf.data import sources
from lminf.evals import perplexity, reread, score
from lminf.evals.key_value import KeyValue
from lminf.evals.passkey import Passkey
from lminf.experiments import _evals, _models
from lminf.experiments._main import main
from lminf.experiments._streams import Stream
from lminf.lm.lm import LM
from lminf.models.layer_policies import chunk_within, common_eviction
from lminf.programs.segment_reading import SegmentReader, SegmentReading
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

REREAD = "re-read"
SEGMENTS = {"segments": SegmentReading}
TASKS = (Passkey.name, KeyValue.name)
CELL = ("task", "policy", "length", "depth")  # what tells one measured cell from another
CHUNK, STEPS = 512, 9  # tokens read and tokens written, to time them


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    cells = [
        *_evals.cells([Passkey(c.generator, depth) for depth in c.depths], c.lengths, c.prompts),
        *_evals.cells(
            [KeyValue(depth) for depth in c.key_value_depths],
            c.key_value_lengths, c.key_value_prompts,
        ),
    ]  # fmt: skip
    segments = {text: parse_choice(text, SEGMENTS) for text in c.policies if in_segments(text)}
    policies = {text: parse_policy(text) for text in c.policies if text not in segments}
    lm = _models.load(c.model, seed=c.seed)
    models = [lm.with_policy(policy) for policy in policies.values()]
    subjects = [
        _evals.subject(c, lm, SegmentReader(lm, segments[text], text))
        if text in segments else _evals.subject(c, lm.with_policy(policies[text]))
        for text in c.policies
    ]  # fmt: skip
    yield from _evals.measure(c, out, lm, subjects, cells)
    done = {cell_of(row) for row in out.rows()}
    if c.nll_length:
        yield from losses(c, lm, models, done)
    for model in models if c.lengths else ():
        position = max(c.lengths)
        if ("speed", model.policy.name, position, None) not in done:
            yield {"model": c.model, "trained_length": lm.spec.trained_length,
                   **speed(model, position)}  # fmt: skip


def cell_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)


def in_segments(text: str) -> bool:
    """Whether the entry of the config is a way of reading in segments and not a policy."""
    return text.partition(":")[0] in SEGMENTS


def losses(
    c: ConfigDict, lm: LM, models: Sequence[LM], done: Container[tuple[Any, ...]]
) -> Iterator[Row]:
    """Loss by position of one text, and how far it lies above re-reading."""
    tokens, _ = lm.encode(sources.text_of(c.text), length=c.nll_length)

    readings = {
        REREAD: partial(reread.token_nll, lm, tokens),
        **{
            model.policy.name: partial(model.token_nll, tokens)
            for model in models
            if not _evals.last_only(model)
        },
    }
    for name, read in readings.items():
        if ("nll", name, len(tokens), None) in done:
            continue
        with Progress(len(tokens), label=name, unit="tokens") as progress:
            started = time.perf_counter()
            nll = read(progress=progress.show)
            seconds = time.perf_counter() - started
        for block in perplexity.by_position([nll], block=c.block):
            yield {
                "model": c.model,
                "trained_length": lm.spec.trained_length,
                "task": "nll",
                "policy": name,
                "length": block.stop,
                "depth": None,
                "start": block.start,
                "nll": block.nll,
                "seconds": seconds,
            }


def speed(lm: LM, position: int) -> Row:
    """Time of reading a chunk, and of a token that is written, after so many tokens."""
    chunk = chunk_within(common_eviction(lm.decoder.policies), CHUNK)
    stream = Stream(lm, position, room=chunk + STEPS)
    cache_bytes = stream.bytes
    steps = [stream.step() for _ in range(STEPS)][1:]  # the first compiles
    read = [stream.read(chunk) for _ in range(3)][1:]
    return {
        "task": "speed",
        "policy": lm.policy.name,
        "length": position,
        "depth": None,
        "read_tokens_per_second": chunk / min(read),
        "ms_per_token": 1e3 * statistics.median(steps),
        "cache_bytes": cache_bytes,
        "steps": len(steps),
        "chunk": chunk,
    }


# --- What is shown --------------------------------------------------------------------------------


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    """Heat maps of what was found by depth, a line for each policy and length; loss by position.

    Where every policy found all, or none, the table says so and there is nothing to draw.
    """
    label = {
        name: short.replace("\n", ", ")
        for name, short in style.short_names(dict.fromkeys(row["policy"] for row in rows)).items()
    }
    figures = {}
    for task, stem in zip(TASKS, ("long_context_eval", "key_value"), strict=True):
        cells = [
            {
                **row,
                "line": f"{label[row['policy']]}, {row['length']:,} tokens",
                "counts": score.count_text(row),
                "percent": f"{100 * row['depth']:g}",
            }
            for row in rows
            if row["task"] == task
        ]
        if len({row["score"] for row in cells}) > 1:
            figures[stem] = plots.heatmap(
                cells, x="percent", y="line", value="score", limits=(0, 1), text="counts",
                x_label="depth of what is asked for (% of the text)", y_label="",
                value_label="found (share of prompts)",
            )  # fmt: skip
    nll = above_reread(rows)
    if nll:
        figures["above_reread"] = plots.curves(
            nll, x="length", y="excess", by="policy", mark=rows[0]["trained_length"],
            x_label="position (tokens)", y_label="loss above re-reading (nats/token)",
        )  # fmt: skip
    return figures


def above_reread(rows: list[Row]) -> list[Row]:
    """The rows of losses that have a re-read one beside them, with their excess over it."""
    nll = [row for row in rows if row["task"] == "nll"]
    base = {row["length"]: row["nll"] for row in nll if row["policy"] == REREAD}
    return [
        {**row, "excess": row["nll"] - base[row["length"]]}
        for row in nll
        if row["policy"] != REREAD and row["length"] in base
    ]


def table(rows: list[Row]) -> list[Row]:
    """A policy a line: what it found inside and outside its window, its loss, speed and memory."""
    beyond = [row for row in above_reread(rows) if row["start"] >= row["trained_length"]]
    retrieval = [row for row in rows if row["task"] in TASKS]
    groups = dict.fromkeys((row["task"], row["length"]) for row in retrieval)
    columns = ("policy", "task", "length", "key_in_window")
    shares = {
        tuple(row[name] for name in columns): score.interval_text(row)
        for row in score.pooled(retrieval, columns)
    }
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != REREAD):
        of_policy = [row for row in rows if row["policy"] == policy]
        line = {"policy": policy}
        if groups:
            attended = [row["attended"] or "all" for row in of_policy if row["task"] in TASKS]
            line["attended"] = attended[0] if attended else None
        for task, length in groups:
            for inside, place in ((True, "in window"), (False, "outside")):
                text = shares.get((policy, task, length, inside), "–")
                line[f"{task} {length:,} {place}"] = text
        excess = [row["excess"] for row in beyond if row["policy"] == policy]
        if excess:
            line["nll above re-reading past the trained length"] = sum(excess) / len(excess)
            line["of the worst block"], line["of the last"] = max(excess), excess[-1]
        if any("cache_bytes" in row for row in of_policy):
            line["cache (MB)"] = max(row.get("cache_bytes", 0) for row in of_policy) / 1e6
        for row in of_policy:
            if row["task"] == "speed":
                line["tokens/s, reading"] = row["read_tokens_per_second"]
                line["ms/token, writing"] = row["ms_per_token"]
        lines.append(line)
    return lines


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
