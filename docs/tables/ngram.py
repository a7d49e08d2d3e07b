"""The tables of docs/ngram.md: benchmarks/results/ngram.jsonl, and the experiment infinigram."""

import math
import statistics
from typing import Any

from docs.tables.rows import FOLDER, Rows, benchmark, markdown, with_table
from lminf.experiments import infinigram
from lminf.run import tables

QUERIES = {
    "count 3": "count of 3 tokens", "count 8": "count of 8 tokens", "prob": "prob after 3 tokens",
    "infgram_prob": "∞-gram prob after 500", "ntd": "ntd after 2 tokens",
    "infgram_ntd": "∞-gram ntd after 501",
}  # fmt: skip


TABLES = """\
{speed}
Medians, in microseconds of processor time a query, of 200 single queries and of three batches of
1,000 on an index of {slots} tokens; `ratio` is the median of the same turn with its quartiles.
Counts of clauses (`count_cnf`) are the same within a document; see above.

Sorting, from the file of tokens to the file of the table, in medians of all turns: in memory on one
core, infini-gram on two; and by our own sort of a sixteenth of the suffixes at a time.

{build}
An index takes 6 bytes a token while a shard has fewer than 2^31 of them, and 7 up to 2^39: 9.8 TB
for 1.4 T tokens. By the size of the corpus a query takes the times below. The last line is that of
the largest corpus by the steps of a binary search, log2 of the tokens: far beyond what was
measured, and without the time of a disk, from which such an index is read.

{growth}
`python -m experiments.infinigram` ([report](results/infinigram/report.md)): the ∞-gram's agreement
with 12 held-out documents of the same kind, its mean n, and how much of SmolLM2's perplexity above
1 its mixture takes away. The last line is no forecast: the paper's 1.4 T tokens are of other texts,
and agree with 47 % of the next tokens of theirs.

{agreement}
"""


def page() -> str:
    """docs/ngram.md with the tables of benchmarks/results/ngram.jsonl and of infinigram."""
    rows = benchmark("ngram")
    slots = max(row["slots"] for row in rows if row["part"] == "speed")
    agreement = tables.markdown(infinigram.growth(Rows("infinigram").rows))
    text = TABLES.format(
        speed=speed(rows), build=build(rows), growth=growth(rows),
        agreement=agreement, slots=f"{slots:,}",
    )  # fmt: skip
    return with_table(FOLDER / "ngram.md", text)


def speed(rows: list[dict[str, Any]]) -> str:
    """Single queries and batches of the largest corpus, and how many answers are the same."""
    answers = {row["kind"]: row for row in rows if row["part"] == "answers"}
    largest = max(row["slots"] for row in rows if row["part"] == "speed")
    lines = [["query", "same answers", "one: µs", "infini-gram", "ratio", "1,000: µs each",
              "infini-gram", "times as fast"]]  # fmt: skip
    for row in rows:
        if row["part"] == "speed" and row["slots"] == largest:
            asked, faster = answers[row["kind"]], 1 / row["batch_ratio"]
            ends = (row["alone_ratio_low"], row["alone_ratio_high"])
            lines.append([
                QUERIES[row["kind"]], f"{asked['same']:,}/{asked['queries']:,}",
                f"{row['alone_us']:.0f}", f"{row['alone_us_peer']:.0f}",
                f"{row['alone_ratio']:.2f} ({ends[0]:.2f}–{ends[1]:.2f})",
                f"{row['batch_us']:.1f}", f"{row['batch_us_peer']:.0f}", f"{faster:.0f}",
            ])  # fmt: skip
    return markdown(lines)


def build(rows: list[dict[str, Any]]) -> str:
    """Seconds of a sort, from tokens in a file to the table in a file, the median of all turns."""
    built = [row for row in rows if row["part"] == "build"]
    lines = [["tokens", "in memory", "infini-gram", "ratio", "own sort, a sixteenth at a time"]]
    for part in sorted({row["of"] for row in built}, reverse=True):
        ours, theirs = ([row for row in built if row["of"] == part and row["side"] == side]
                        for side in ("lminf", "infini-gram"))  # fmt: skip
        sort, own, peer = (
            statistics.median(row[name] for row in side if name in row)
            for side, name in ((ours, "sort_seconds"), (ours, "own_sort_seconds"),
                               (theirs, "sort_seconds"))
        )  # fmt: skip
        seconds = [f"{value:.1f} s" for value in (sort, peer)]
        lines.append([f"{ours[0]['slots']:,}", *seconds, f"{sort / peer:.2f}", f"{own:.1f} s"])
    return markdown(lines)


def growth(rows: list[dict[str, Any]]) -> str:
    """Time of a query by tokens of the corpus; the last line is that of the largest by the steps of
    a binary search, at the size of the paper's largest corpus."""
    kinds = {"count 8": "count of 8 tokens", "infgram_prob": "∞-gram prob after 500"}
    found = {(row["kind"], row["slots"]): row for row in rows if row["part"] == "speed"}
    sizes = sorted({slots for _, slots in found})
    steps = math.log(infinigram.PUBLISHED_TOKENS) / math.log(sizes[-1])
    lines = [["tokens", *(f"{name}, {how}: µs" for name in kinds.values()
                          for how in ("one", "of 1,000"))]]  # fmt: skip
    for name, size, factor in (
        *((f"{size:,}", size, 1.0) for size in sizes), ("1.4 T, by steps", sizes[-1], steps)
    ):  # fmt: skip
        times = [found[kind, size][how] for kind in kinds for how in ("alone_us", "batch_us")]
        lines.append([name, *(f"{factor * time:.1f}" for time in times)])
    return markdown(lines)
