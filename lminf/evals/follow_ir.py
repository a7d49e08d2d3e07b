"""FollowIR: whether a ranking obeys an instruction that says what is not relevant.

Every query has two instructions, of which the second one rules out documents that the first one has
as relevant, or as more relevant. A ranker that obeys moves them down:

    p-MRR   mean over queries of the mean over ruled-out documents of metrics.paired_mrr: -1 to 1
            and 0 for who ignores the instruction
    MAP     mean average precision of the first 1,000 documents, under either instruction, over the
            queries that have a relevant one; what the release scores Robust04 and Core17 by
    nDCG@5  over the same queries, with graded judgements for gains; what it scores News21 by

Source: Weller et al. 2024, arXiv:2403.15246. The published data are folders, one a collection:
corpus.jsonl (_id, title, text), queries.jsonl (_id, text, instruction_og, instruction_changed),
qrels_og/test.tsv and qrels_changed/test.tsv (query-id, corpus-id, score), and top_ranked.jsonl
(qid, pid), the documents to be ranked. Any function can rank; `by_model` asks a language model.
"""

import csv
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from lminf.atomic import read_bytes
from lminf.errors import InputError
from lminf.evals import metrics, score
from lminf.evals.score import Interval
from lminf.evals.suites import published
from lminf.lm.protocol import LanguageModel

DEEPEST = 1000  # documents of a ranking that its average precision counts
FIRST = 5  # documents of a ranking that its nDCG counts
BENCHMARK = "FollowIR"


class Instruction(NamedTuple):
    """An instruction, and what it has as relevant."""

    text: str
    gains: Mapping[str, float]  # of relevant documents: above 0


@dataclass(frozen=True)
class Query:
    """A query with its two instructions and the documents to be ranked, id -> text."""

    text: str
    original: Instruction
    changed: Instruction
    documents: Mapping[str, str]

    @property
    def ruled_out(self) -> list[str]:
        """The documents that the first instruction has as more relevant than the second one."""
        before, after = self.original.gains, self.changed.gains
        return [each for each in self.documents if after.get(each, 0) < before.get(each, 0)]

    @property
    def digest(self) -> str:
        """A digest of the query, its instructions and its documents."""
        instructions = ((each.text, sorted(each.gains.items()))
                        for each in (self.original, self.changed))  # fmt: skip
        parts = (self.text, *instructions, *self.documents.items())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# (query, instruction, documents by id) -> ids, the most relevant first
Ranker: TypeAlias = Callable[[str, str, Mapping[str, str]], Sequence[str]]


class QueryScores(NamedTuple):
    """What the two rankings of a query are worth; None: it has no document to tell it by."""

    p_mrr: float | None
    ap_original: float | None  # average precision
    ap_changed: float | None
    ndcg_original: float | None
    ndcg_changed: float | None


class Result(NamedTuple):
    """What a ranker obeys and finds: means over queries with their 95 % intervals."""

    p_mrr: Interval  # -1 to 1
    map_original: Interval
    map_changed: Interval
    ndcg_original: Interval
    ndcg_changed: Interval
    queries: int  # in which a document is ruled out


def evaluate(rank: Ranker, queries: Sequence[Query]) -> Result:
    """Ranks the documents of every query under both instructions."""
    return summary([measure(rank, query) for query in queries])


def measure(rank: Ranker, query: Query) -> QueryScores:
    """Ranks the documents of a query under both instructions."""
    instructions = query.original, query.changed
    original, changed = (_ranking(rank, query, instruction) for instruction in instructions)
    falls = [
        metrics.paired_mrr(original.index(each) + 1, changed.index(each) + 1)
        for each in query.ruled_out
    ]
    judged = [
        (ranking, instruction.gains)
        for ranking, instruction in zip((original, changed), instructions, strict=True)
    ]
    return QueryScores(
        sum(falls) / len(falls) if falls else None,
        *(metrics.average_precision(ranking[:DEEPEST], gains) if gains else None
          for ranking, gains in judged),
        *(metrics.ndcg(ranking, gains, at=FIRST) if gains else None for ranking, gains in judged),
    )  # fmt: skip


def summary(measured: Sequence[QueryScores]) -> Result:
    """The means of what was measured of each query."""
    columns = [
        [value for value in column if value is not None] for column in zip(*measured, strict=True)
    ]
    if not measured or not columns[0]:
        raise InputError("no query has a document that its changed instruction rules out")
    means = (score.over_documents(column or [0.0]) for column in columns)
    return Result(*means, queries=len(columns[0]))


def _ranking(rank: Ranker, query: Query, instruction: Instruction) -> list[str]:
    ids = list(rank(query.text, instruction.text, query.documents))
    if sorted(ids) != sorted(query.documents):
        raise InputError(
            f"a ranking for {query.text!r} has {len(ids)} documents, of {len(query.documents)} to "
            f"rank; give each of them once"
        )
    return ids


def by_model(model: LanguageModel) -> Ranker:
    """Ranks by how likely it is that a document is relevant: by the log-probability of `true` less
    that of `false`.
    """
    return partial(_by_model, model)


def _by_model(
    model: LanguageModel, query: str, instruction: str, documents: Mapping[str, str]
) -> list[str]:
    def odds(text: str) -> float:
        prompt = (
            f"Document: {text}\n\nQuery: {query}\n{instruction}\nThe document is relevant, true "
            f"or false?\nAnswer:"
        )
        true, false = model.score([prompt] * 2, [" true", " false"])
        return true.log_prob - false.log_prob

    return sorted(documents, key=lambda document: -odds(documents[document]))


# --- Data -----------------------------------------------------------------------------------------


def read(folder: str | Path) -> list[Query]:
    """The queries of a published collection, in the order of its file."""
    folder = Path(folder)
    corpus = {
        str(each["_id"]): " ".join(filter(None, (each.get("title"), each["text"])))
        for each in _records(folder / "corpus.jsonl", ("_id", "text"), texts=("title", "text"))
    }
    candidates: dict[str, list[str]] = {}
    for each in _records(folder / "top_ranked.jsonl", ("qid", "pid")):
        candidates.setdefault(str(each["qid"]), []).append(str(each["pid"]))
    original, changed = (
        _gains(folder / name / "test.tsv") for name in ("qrels_og", "qrels_changed")
    )
    fields = ("_id", "text", "instruction_og", "instruction_changed")
    queries = []
    for each in _records(folder / "queries.jsonl", fields, texts=fields[1:]):
        name = str(each["_id"])
        ids = candidates.get(name, [])
        missing = [document for document in ids if document not in corpus]
        if missing or not ids:
            lacking = f"lacks the document {missing[0]}" if ids else "has no documents to rank"
            raise InputError(f"{folder} {lacking} for the query {name}; fetch it again")
        queries.append(Query(
            each["text"],
            Instruction(each["instruction_og"], original.get(name, {})),
            Instruction(each["instruction_changed"], changed.get(name, {})),
            {document: corpus[document] for document in ids},
        ))  # fmt: skip
    if not any(query.ruled_out for query in queries):
        raise InputError(
            f"{folder} has no query whose changed instruction rules a document out, which is what "
            f"is measured; fetch qrels_og and qrels_changed again"
        )
    return queries


def _records(path: Path, fields: Sequence[str], *, texts: Sequence[str] = ()) -> list[dict]:
    """Records that have the fields; those of `texts` are texts, and null only where optional."""
    records = published.read_records(str(path), BENCHMARK, fields)
    for number, record in enumerate(records, 1):
        for name in texts:
            value = record.get(name)
            if not isinstance(value, str) and (value is not None or name in fields):
                raise InputError(
                    f"record {number} of {path} has {value!r} as {name!r}, which is no text; it is "
                    f"not of {BENCHMARK}, or damaged"
                )
    return records


def _gains(path: Path) -> dict[str, dict[str, float]]:
    """The documents with a score above 0 of each query, and their scores."""
    try:
        rows = list(csv.DictReader(read_bytes(path).decode().splitlines(), delimiter="\t"))
        gains: dict[str, dict[str, float]] = {}
        for row in rows:
            if not math.isfinite(value := float(row["score"])):
                raise ValueError(f"a score of {value}")
            if value > 0:
                gains.setdefault(row["query-id"], {})[row["corpus-id"]] = value
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path} is no table of query-id, corpus-id and score between tabs ({error}); it is "
            f"not of {BENCHMARK}, or damaged"
        ) from error
    return gains


CITIES = ("Lima", "Oslo", "Dakar", "Hanoi", "Quito", "Riga")
GOODS = ("tents", "books", "bricks", "lamps", "boats", "clocks")


def generate(*, count: int, documents: int, key: Sequence[int]) -> list[Query]:
    """Queries of the published form about goods that are sent to cities, of which the changed
    instruction rules one out.
    """
    queries = []
    for number in range(count):
        random = np.random.default_rng((*key, number))
        goods = str(random.choice(GOODS))
        out, excluded = (str(city) for city in random.choice(CITIES, 2, replace=False))
        sent = [(str(random.choice(GOODS)), str(random.choice(CITIES))) for _ in range(documents)]
        sent[:2] = (goods, out), (goods, excluded)  # one is ruled out and one is not
        about = [index for index, (thing, _) in enumerate(sent) if thing == goods]
        first = f"A relevant document says where {goods} were sent."
        queries.append(Query(
            f"Where were {goods} sent?",
            Instruction(first, {str(index): 1.0 for index in about}),
            Instruction(
                f"{first} Documents about {out} are not relevant.",
                {str(index): 1.0 for index in about if sent[index][1] != out},
            ),
            {str(index): f"Some {thing} were sent to {city}."
             for index, (thing, city) in enumerate(sent)},
        ))  # fmt: skip
    return queries
