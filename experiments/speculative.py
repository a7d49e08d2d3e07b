"""Calls and time of speculative decoding, by draft and context length, beside plain decoding.

Texts are gone on with greedily, so every draft writes what plain decoding writes: rows have digests
of both the text and what was written. Seconds are those after the prompt: the median time of calls
that verify, and of others, times how many there were, so that compiling is not counted. Where a
processor is shared, its own time (`processor_seconds`) tells more than the time that passed.
Answers to questions about texts (`_drafted_answers`) are drawn.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.data import sources
from lminf.evals import score
from lminf.experiments import _drafted_answers, _models, _texts
from lminf.experiments._drafted_answers import DraftedAnswers
from lminf.experiments._main import main
from lminf.lm import generate, speculative
from lminf.lm.drafts import parse_draft
from lminf.lm.generate import GREEDY
from lminf.lm.lm import LM
from lminf.lm.ngram_draft import NGramDraft
from lminf.lm.speculative import Draft, Round
from lminf.ngram import matches
from lminf.run import plots
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress

NONE = "none"  # plain decoding
MAY_CHANGE = ("documents", "drafts", "lengths", "answers.documents")  # when a run goes on
CORPUS = "ngram"  # the draft of an index of the text's other documents, which is built here


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    makes = {
        text: parse_draft(text, model=c.model, load=lambda name: _models.load(name, seed=c.seed))
        for text in c.drafts if text != CORPUS
    }  # fmt: skip
    lm = _models.load(c.model, seed=c.seed)
    documents = {
        length: _texts.tokenised(lm, c.text, length=length, count=c.documents)
        for length in c.lengths
    }
    done, cells = {identity(row) for row in out.rows() if "part" not in row}, 0
    missing = {
        (name, length, number) for name in (NONE, *c.drafts) for length in c.lengths
        for number in range(c.documents) if (name, length, number) not in done
    }  # fmt: skip
    drafts = {NONE: None} | {text: make(lm) for text, make in makes.items()}
    total = (1 + len(c.drafts)) * len(c.lengths) * c.documents
    with tempfile.TemporaryDirectory() as folder, Progress(total, label="texts") as progress:
        if any(name == CORPUS for name, *_ in missing):
            measured = [each for texts in documents.values() for each in texts]
            drafts[CORPUS] = of_corpus(c, lm, Path(folder), measured)
        for length, texts in documents.items():
            for number, (tokens, digest) in enumerate(texts):
                for name in (NONE, *c.drafts):
                    if (name, length, number) in missing:
                        draft = drafts[name]
                        answer = written(lm, tokens[:length], c.new_tokens, draft, c.draft_tokens)
                        yield {
                            "model": c.model, "draft": name, "length": length, "document": number,
                            "text": digest, "new_tokens": c.new_tokens,
                            "draft_tokens": c.draft_tokens, **answer,
                        }  # fmt: skip
                    progress.update(cells := cells + 1)
    common = {"model": c.model, "seed": c.seed, "draft_tokens": c.draft_tokens}
    yield from DraftedAnswers(ConfigDict({**c.answers.to_dict(), **common}), lm).rows(out)


def identity(row: Row) -> tuple:
    return row["draft"], row["length"], row["document"]


def of_corpus(
    c: ConfigDict, lm: LM, folder: Path, texts: Sequence[tuple[Int[np.ndarray, " _"], str]]
) -> NGramDraft:
    """The draft of an index of the other documents, without copies of those measured."""
    digests = {digest for _, digest in texts}
    corpus = [lm.tokenizer.encode(text) for text in _texts.texts(c.text)[: c.corpus_documents]
              if sources.digest(text) not in digests]  # fmt: skip
    index = _texts.indexed(folder / "others", lm, corpus)
    copies = {each.document for each in matches.contaminated(index, [ids for ids, _ in texts])}
    if copies:
        corpus = [ids for number, ids in enumerate(corpus) if number not in copies]
        index = _texts.indexed(folder / "no copies", lm, corpus)
    return NGramDraft(index)


def written(
    lm: LM, prompt: Int[np.ndarray, " _"], new_tokens: int, draft: Draft | None, draft_tokens: int
) -> Row:
    """What is written greedily with a draft, or without one."""
    options = {"sampling": GREEDY, "max_new_tokens": new_tokens, "key": jax.random.key(0)}
    if draft is None:
        stream = generate.generate_tokens(lm, [prompt], **options)
        rounds = (Round([token], 0, 0, int(n > 0)) for n, token in enumerate(stream))
    else:
        speculation = speculative.Speculation(draft, draft_tokens)
        rounds = speculative.rounds(lm, [prompt], speculation, **options)
    (first, *later_rounds), times = timed(rounds)
    kinds = [(each.drafted > 0, each.target_calls) for each in later_rounds]
    tokens = np.concatenate([each.tokens[0] for each in (first, *later_rounds)])
    return {
        "answer": sources.digest(" ".join(map(str, tokens))),
        "calls": sum(each.target_calls for each in later_rounds),  # after the prompt
        "drafted": sum(each.drafted for each in later_rounds),
        "accepted": sum(each.accepted for each in later_rounds),
        "seconds": steady([time.wall for time in times[1:]], kinds),
        "processor_seconds": steady([time.processor for time in times[1:]], kinds),
        "prompt_processor_seconds": times[0].processor,  # compiling included
    }


class Time(NamedTuple):
    wall: float  # s
    processor: float  # s, of all cores


def timed(items: Iterable[Round]) -> tuple[list[Round], list[Time]]:
    """All items, and the time until each of them came."""
    results, clocks = [], [(time.perf_counter(), time.process_time())]
    for item in items:
        results.append(item)
        clocks.append((time.perf_counter(), time.process_time()))
    return results, [Time(*each) for each in np.diff(clocks, axis=0).tolist()]


def steady(times: Sequence[float], kinds: Sequence[tuple]) -> float:
    """The sum of the times, each taken for the median of its kind."""
    by_kind: dict[tuple, list[float]] = {}
    for kind, seconds in zip(kinds, times, strict=True):
        by_kind.setdefault(kind, []).append(seconds)
    return float(sum(len(group) * np.median(group) for group in by_kind.values()))


# --- What is shown --------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[Row]:
    """Means over documents with 95 % intervals, a draft and length a line; then a line for each way
    to answer questions.
    """
    answers, rows = parts(rows)
    plain = {(row["length"], row["document"]): row for row in rows if row["draft"] == NONE}
    groups: dict[tuple, list[tuple[Row, Row]]] = {}
    for row in rows:
        if base := plain.get((row["length"], row["document"])):
            groups.setdefault((row["length"], row["draft"]), []).append((row, base))
    lines: list[Row] = [
        {
            "context": f"{length:,}",
            "draft": draft,
            "documents": len(group),
            "accepted": None if draft == NONE else share([row for row, _ in group]),
            "tokens a call": mean([tokens_per_call(row) for row, _ in group]),
            "processor s": mean([row["processor_seconds"] for row, _ in group]),
            "times as fast": None if draft == NONE else mean(
                [base["processor_seconds"] / row["processor_seconds"] for row, base in group]
            ),
            "as without": f"{sum(row['answer'] == base['answer'] for row, base in group)} of "
                          f"{len(group)}",
        }
        for (length, draft), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]  # fmt: skip
    for way, group in _drafted_answers.groups(answers).items():
        lines.append({
            "context": f"{group[0]['length']:,}",
            "draft": way.draft,
            "documents": len(group),
            "accepted": share(group) if way.acceptance else None,
            "tokens a call": mean([_drafted_answers.tokens_per_call(row) for row in group]),
            "acceptance": way.acceptance or None,
            "questions": sum(row["questions"] for row in group),
            "answered": score.value_text(_drafted_answers.answered(group)),
        })  # fmt: skip
    return lines


def parts(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(rows of questions, rows of texts that were gone on with)."""
    answers = [row for row in rows if row.get("part") == _drafted_answers.PART]
    return answers, [row for row in rows if "part" not in row]


def mean(values: list[float]) -> str:
    return score.value_text(score.over_documents(values))


def share(rows: list[Row]) -> str:
    """Accepted tokens, of those that were drafted."""
    accepted, drafted = (sum(row[name] for row in rows) for name in ("accepted", "drafted"))
    return f"{accepted:,}/{drafted:,}"


def tokens_per_call(row: Row) -> float:
    """The first token comes of reading the prompt."""
    return (row["new_tokens"] - 1) / row["calls"]


def plot(rows: list[Row]) -> dict[str, Figure]:
    """Tokens that a call of the model writes, by draft; and questions that are answered rightly, by
    who answers.
    """
    answers, rows = parts(rows)
    shown = [
        {"context": f"{row['length']:,} tokens", "draft": row["draft"].partition(",")[0],
         "value": tokens_per_call(row)}
        for row in rows
        if row["draft"] != NONE
    ]  # fmt: skip
    figures = {
        "speculative": plots.bars(
            shown, x="context", y="value", by="draft", center=np.mean, x_label="context",
            y_label="tokens a call (of the model)",
        )
    }  # fmt: skip
    if answers:
        right = [
            {"way": way.acceptance or way.draft, "value": row["right"] / row["questions"]}
            for way, group in _drafted_answers.groups(answers).items() for row in group
        ]  # fmt: skip
        figures["answers"] = plots.bars(
            right, x="way", y="value", center=np.mean, x_label="who answers",
            y_label="questions answered (share of a text's)",
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True, may_change=MAY_CHANGE)
