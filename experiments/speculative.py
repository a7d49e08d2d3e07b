"""Calls and seconds of speculative decoding, by draft and context length, beside plain decoding.

Answers are greedy, so every draft writes what plain decoding writes; a row says whether it did.
Seconds are those after the prompt: the median time of calls that verify, and of others, times how
many there were, so that compiling is not counted. A document's lines are measured in turn.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.evals import score
from lminf.experiments import _models, _texts
from lminf.experiments._main import main
from lminf.lm import generate, speculative
from lminf.lm.drafts import parse_draft
from lminf.lm.generate import GREEDY
from lminf.lm.lm import LM
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

NONE = "none"  # plain decoding


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    makes = {
        text: parse_draft(text, model=c.model, load=lambda name: _models.load(name, seed=c.seed))
        for text in c.drafts
    }
    lm = _models.load(c.model, seed=c.seed)
    drafts = {text: make(lm) for text, make in makes.items()}
    done = {identity(row) for row in out.rows()}
    with Progress(len(c.lengths) * c.documents, label="documents", unit="documents") as progress:
        for length in c.lengths:
            texts = _texts.tokenised(lm, c.text, length=length, count=c.documents)
            for number, (tokens, digest) in enumerate(texts):
                cells = [(draft, length, number) for draft in (NONE, *drafts)]
                missing = [cell for cell in cells if cell not in done]
                plain = written(lm, tokens[:length], c.new_tokens) if missing else None
                for cell in missing:
                    assert plain is not None
                    answer = plain
                    if (draft := cell[0]) != NONE:
                        speculation = speculative.Speculation(drafts[draft], c.draft_tokens)
                        answer = drafted(lm, tokens[:length], c.new_tokens, speculation)
                    yield {
                        "model": c.model, "draft": draft, "length": length, "document": number,
                        "text": digest, "new_tokens": c.new_tokens, "draft_tokens": c.draft_tokens,
                        "calls": answer.calls, "drafted": answer.drafted,
                        "accepted": answer.accepted, "seconds": answer.seconds,
                        "prompt_seconds": answer.prompt_seconds,
                        "plain_seconds": plain.seconds,
                        "equal": bool(np.array_equal(answer.tokens, plain.tokens)),
                    }  # fmt: skip
                progress.update(number + 1)


def identity(row: Row) -> tuple:
    return row["draft"], row["length"], row["document"]


class Answer(NamedTuple):
    tokens: Int[np.ndarray, " T"]
    calls: int  # of the model, after the prompt
    drafted: int
    accepted: int
    seconds: float  # after the prompt
    prompt_seconds: float  # until the first token, compiling included


def written(lm: LM, prompt: Int[np.ndarray, " _"], new_tokens: int) -> Answer:
    """What plain decoding writes."""
    tokens, times = timed(
        generate.generate_tokens(
            lm, [prompt], sampling=GREEDY, max_new_tokens=new_tokens, key=jax.random.key(0)
        )
    )
    seconds = steady(times[1:], [0] * (new_tokens - 1))
    return Answer(np.concatenate(tokens), new_tokens - 1, 0, 0, seconds, times[0])


def drafted(
    lm: LM, prompt: Int[np.ndarray, " _"], new_tokens: int, speculation: speculative.Speculation
) -> Answer:
    """What is written with a draft."""
    (first, *rounds), times = timed(
        speculative.rounds(
            lm, [prompt], speculation, sampling=GREEDY, max_new_tokens=new_tokens,
            key=jax.random.key(0),
        )
    )  # fmt: skip
    kinds = [(each.drafted > 0, each.target_calls) for each in rounds]
    return Answer(
        np.concatenate([each.tokens[0] for each in (first, *rounds)]),
        sum(each.target_calls for each in rounds), sum(each.drafted for each in rounds),
        sum(each.accepted for each in rounds), steady(times[1:], kinds), times[0],
    )  # fmt: skip


def timed(items: Iterator) -> tuple[list, list[float]]:
    """All items, and the seconds until each of them came."""
    results, times, started = [], [], time.perf_counter()
    for item in items:
        results.append(item)
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
    return results, times


def steady(times: list[float], kinds: list) -> float:
    """The sum of the times, each taken for the median of its kind."""
    by_kind: dict = {}
    for kind, seconds in zip(kinds, times, strict=True):
        by_kind.setdefault(kind, []).append(seconds)
    return float(sum(len(group) * np.median(group) for group in by_kind.values()))


# --- What is shown --------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[Row]:
    """Means over documents with 95 % intervals, a draft and length a line."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["length"], row["draft"]), []).append(row)
    return [
        {
            "context": f"{length:,}",
            "draft": draft,
            "documents": len(group),
            "accepted": None if draft == NONE else share(group),
            "tokens a call": mean([tokens_per_call(row) for row in group]),
            "calls": mean([row["calls"] for row in group], digits=0),
            "seconds": mean([row["seconds"] for row in group]),
            "times as fast": None if draft == NONE else
                mean([row["plain_seconds"] / row["seconds"] for row in group]),
            "as plain": f"{sum(row['equal'] for row in group)}/{len(group)}",
        }
        for (length, draft), group in groups.items()
    ]  # fmt: skip


def mean(values: list[float], *, digits: int = 2) -> str:
    return score.value_text(score.over_documents(values), digits=digits)


def share(rows: list[Row]) -> str:
    """Accepted tokens, of those that were drafted."""
    accepted, drafted = (sum(row[name] for row in rows) for name in ("accepted", "drafted"))
    return f"{accepted:,}/{drafted:,}"


def tokens_per_call(row: Row) -> float:
    """The first token comes of reading the prompt."""
    return (row["new_tokens"] - 1) / row["calls"]


def plot(rows: list[Row]) -> Figure:
    """Tokens that a call of the model writes, by draft."""
    shown = [
        {"context": f"{row['length']:,} tokens", "draft": row["draft"].partition(",")[0],
         "value": tokens_per_call(row)}
        for row in rows
        if row["draft"] != NONE
    ]  # fmt: skip
    return plots.bars(
        shown, x="context", y="value", by="draft", center=np.mean, x_label="context",
        y_label="tokens a call of the model",
    )  # fmt: skip


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=("documents", "drafts", "lengths"))
