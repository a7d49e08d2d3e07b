"""What policies that choose by content find outside their window, beside those that forget it.

The prompts of a task and length differ in where the key stands, or in what is asked, and are the
same before: each policy reads what they share once (`lminf.lm.prefix`).
"""

import statistics
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policy import chunk_within, common_eviction
from lminf.config import parse_choice
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import key_value, passkey, perplexity, reread, score
from lminf.evals.passkey import Sample
from lminf.experiments import _models
from lminf.experiments._main import main
from lminf.experiments._streams import Stream
from lminf.experiments.passkey import in_window
from lminf.lm import prefix
from lminf.lm.lm import LM
from lminf.models import cost
from lminf.programs import segment_reading
from lminf.programs.segment_reading import SegmentReading
from lminf.run import plots, style
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

REREAD = "re-read"
SEGMENTS = {"segments": SegmentReading}
TASKS = ("passkey", "key_value")
Cells: TypeAlias = Sequence[tuple[float, Sequence[Sample]]]  # (depth, prompts)
CELL = ("task", "policy", "length", "depth")  # what tells one measured cell from another
CHUNK, STEPS = 512, 9  # tokens read and tokens written, to time them
TOGETHER = 2  # prompts read side by side once they differ: more are no faster on a CPU


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    lm = _models.load(c.model, seed=c.seed)
    readers = [reader(lm, text) for text in c.policies]  # refuses bad windows at once
    for task, prompts, lengths in zip(
        TASKS, (c.prompts, c.key_value_prompts), (c.lengths, c.key_value_lengths), strict=True
    ):
        if len(prompts) != len(lengths):
            raise InputError(
                f"{task}: numbers of prompts {prompts} for lengths {lengths}; give one per length"
            )
    done = {cell_of(row) for row in out.rows()}
    missing = [
        (task, length, one, cells)
        for task, length, asked in questions(c, lm)
        for one in readers
        if (cells := [cell for cell in asked if (task, one.name, length, cell[0]) not in done])
    ]
    total = sum(tokens_of(cells) for *_, cells in missing)
    with Progress(total, label="questions", unit="tokens") as progress:
        read = 0
        for task, length, one, cells in missing:
            for row in answered(one, task, length, cells, progress, read):
                yield {"model": c.model, "trained_length": lm.spec.trained_length, **row}
            read += tokens_of(cells)
            progress.update(read)
    own = [one for one in readers if one.policy is not None]
    if c.nll_length:
        yield from losses(c, lm, own, done)
    for one in own if c.lengths else ():
        after = max(c.lengths)
        if ("speed", one.name, after, None) not in done:
            yield {"model": c.model, "trained_length": lm.spec.trained_length, **speed(one, after)}


def cell_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CELL)


def tokens_of(cells: Cells) -> int:
    """Of all prompts, asked one by one."""
    return sum(sample.tokens for _, group in cells for sample in group)


@dataclass(frozen=True)
class Reader:
    """A policy, or reading in segments, under the name that the config gives it."""

    name: str
    lm: LM
    policy: Any  # None: in segments
    answer: Callable[..., list[str]]  # (prompts, progress=) -> texts
    attended: int | None  # tokens that a query sees at most; None: all

    def in_window(self, sample: Sample) -> bool:
        return self.policy is not None and in_window(self.policy, sample)

    def cache_bytes(self, tokens: int) -> int:
        """Of every array that is held for one text of so many tokens."""
        tokens = min(tokens, self.attended or tokens) if self.policy is None else tokens
        by_layer = self.lm.decoder.policies
        return cost.cache_bytes(self.lm.spec, by_layer, tokens=tokens, dtype=self.lm.dtype)


def reader(lm: LM, text: str) -> Reader:
    by_segments = text.partition(":")[0] in SEGMENTS
    how = parse_choice(text, SEGMENTS) if by_segments else parse_policy(text)
    new = passkey.ANSWER_TOKENS
    if isinstance(how, SegmentReading):

        def in_segments(prompts, *, progress):
            answers = []
            for prompt in prompts:
                answers.append(segment_reading.generate(lm, prompt, how, max_new_tokens=new))
                progress(len(lm.encode(prompt)[0]))
            return answers

        return Reader(text, lm, None, in_segments, longest_context(lm, how))
    own = lm.with_policy(how)

    def at_once(prompts, *, progress):
        return prefix.generate(own, prompts, max_new_tokens=new, rows=TOGETHER, progress=progress)

    return Reader(how.name, own, how, at_once, cost.attended_tokens(how))


def longest_context(lm: LM, how: SegmentReading) -> int:
    """Tokens that an answer in segments is written from, and the answer's."""
    count = how.select.count if isinstance(how.select, segment_reading.TopK) else None
    if count is None:
        return lm.context_length
    kept = how.head_len + count * how.segment_len + how.question_len
    return min(lm.context_length, kept + passkey.ANSWER_TOKENS)


def questions(c: ConfigDict, lm: LM) -> Iterator[tuple[str, int, Cells]]:
    """(task, length, [(depth, samples)]), the same for every policy."""

    def encode(text):
        return lm.encode(text)[0]

    for length, count in zip(c.lengths, c.prompts, strict=True):
        yield TASKS[0], length, [
            (depth, passkey.draw(
                c.generator, encode, length=length, count=count, seed=c.seed, depth=depth
            ))
            for depth in c.depths
        ]  # fmt: skip
    for length, count in zip(c.key_value_lengths, c.key_value_prompts, strict=True):
        yield (
            "key_value",
            length,
            [
                (
                    depth,
                    key_value.draw(encode, length=length, count=count, seed=c.seed, depth=depth),
                )
                for depth in c.key_value_depths
            ],
        )


def answered(
    reader: Reader, task: str, length: int, cells: Cells, progress: Progress, before: int
) -> Iterator[Row]:
    """The cells of one policy: a task at one length, at several depths."""
    samples = [sample for _, group in cells for sample in group]
    read = before

    def show(tokens):
        nonlocal read
        read += tokens
        progress.update(read)

    started = time.perf_counter()
    answers = iter(reader.answer([sample.prompt for sample in samples], progress=show))
    seconds = time.perf_counter() - started
    for depth, group in cells:
        correct = sum(sample.correct(next(answers)) for sample in group)
        accuracy, low, high = score.success_rate(correct, len(group))
        yield {
            "task": task,
            "policy": reader.name,
            "length": length,
            "depth": depth,
            "prompts_digest": sources.digest("\0".join(sample.prompt for sample in group)),
            "key_in_window": all(reader.in_window(sample) for sample in group),
            "attended": reader.attended,
            "prompts": len(group),
            "correct": correct,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "cache_bytes": reader.cache_bytes(length + passkey.ANSWER_TOKENS),
            "seconds": seconds * len(group) / len(samples),  # its share of all depths'
        }


def losses(
    c: ConfigDict, lm: LM, readers: Sequence[Reader], done: Container[tuple[Any, ...]]
) -> Iterator[Row]:
    """Loss by position of one text, and how far it lies above re-reading."""
    tokens, _ = lm.encode(sources.text_of(c.text), length=c.nll_length)

    def measured(name, read):
        with Progress(len(tokens), label=name, unit="tokens") as progress:
            started = time.perf_counter()
            nll = read(lambda count, _: progress.update(count))
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

    last = ("nll", REREAD, len(tokens), None)
    if last not in done:
        yield from measured(REREAD, lambda show: reread.token_nll(lm, tokens, progress=show))
    for one in readers:
        if ("nll", one.name, len(tokens), None) not in done:
            yield from measured(
                one.name, lambda show, lm=one.lm: lm.token_nll(tokens, progress=show)
            )


def speed(reader: Reader, after: int) -> Row:
    """Time of reading a chunk, and of a token that is written, after so many tokens."""
    chunk = chunk_within(common_eviction(reader.lm.decoder.policies), CHUNK)
    stream = Stream(reader.lm, after, room=chunk + STEPS)
    held = stream.bytes
    steps = [stream.step() for _ in range(STEPS)][1:]  # the first compiles
    read = [stream.read(chunk) for _ in range(3)][1:]
    return {
        "task": "speed",
        "policy": reader.name,
        "length": after,
        "depth": None,
        "read_tokens_per_second": chunk / min(read),
        "ms_per_token": 1e3 * statistics.median(steps),
        "cache_bytes": held,
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
        found = [
            {
                **row,
                "asked": f"{label[row['policy']]}, {row['length']:,} tokens",
                "counts": f"{row['correct']}/{row['prompts']}",
                "percent": f"{100 * row['depth']:g}",
            }
            for row in rows
            if row["task"] == task
        ]
        if len({row["accuracy"] for row in found}) > 1:
            figures[stem] = plots.heatmap(
                found, x="percent", y="asked", value="accuracy", limits=(0, 1), text="counts",
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
    groups = dict.fromkeys((r["task"], r["length"]) for r in rows if r["task"] in TASKS)
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != REREAD):
        own = [row for row in rows if row["policy"] == policy]
        asked = [row for row in own if row["task"] in TASKS]
        line = {"policy": policy}
        if groups:
            line["attended"] = (asked[0]["attended"] or "all") if asked else None
        for task, length in groups:
            for inside in (True, False):
                cells = [row for row in asked if row["key_in_window"] == inside
                         and (row["task"], row["length"]) == (task, length)]  # fmt: skip
                line[f"{task} {length:,} {'in window' if inside else 'outside'}"] = share(cells)
        excess = [row["excess"] for row in beyond if row["policy"] == policy]
        if excess:
            line["nll above re-reading past the trained length"] = sum(excess) / len(excess)
            line["of the worst block"], line["of the last"] = max(excess), excess[-1]
        if any("cache_bytes" in row for row in own):
            line["cache (MB)"] = max(row.get("cache_bytes", 0) for row in own) / 1e6
        for row in own:
            if row["task"] == "speed":
                line["tokens/s, reading"] = row["read_tokens_per_second"]
                line["ms/token, writing"] = row["ms_per_token"]
        lines.append(line)
    return lines


def share(cells: list[Row]) -> str:
    """`19/20 = 0.95 (0.76–0.99)`, with the Wilson interval."""
    prompts, correct = (sum(row[name] for row in cells) for name in ("prompts", "correct"))
    if not prompts:
        return "–"
    rate, low, high = score.success_rate(correct, prompts)
    return f"{correct}/{prompts} = {rate:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)
