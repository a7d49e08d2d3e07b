"""FollowIR on generated queries: rankers that obey, ignore and defy an instruction; its files."""

import json
import math
import re

import pytest

from lminf import cli
from lminf.attention.policy import FULL
from lminf.commands import _model, rerank
from lminf.errors import InputError
from lminf.evals import follow_ir
from lminf.evals.suites import catalog
from lminf.lm.scripted import Scripted

QUERIES = follow_ir.generate(count=5, documents=12, key=(0,))


def obeying(query, instruction, documents):
    """Relevant ones first, those about what the instruction rules out last; read from the texts."""
    (goods,) = re.findall(r"Where were (\w+) sent", query)
    out = re.findall(r"about (\w+) are not", instruction)
    return sorted(documents, key=lambda name: (
        goods not in documents[name] or any(city in documents[name] for city in out)
    ))  # fmt: skip


def ignoring(query, instruction, documents):
    return obeying(query, "", documents)


def test_who_obeys_moves_documents_down_and_who_ignores_does_not():
    obeyed = follow_ir.evaluate(obeying, QUERIES)
    assert obeyed.p_mrr.low > 0
    assert (obeyed.map_original.mean, obeyed.map_changed.mean, obeyed.queries) == (1, 1, 5)
    ignored = follow_ir.evaluate(ignoring, QUERIES)
    assert ignored.p_mrr == (0, 0, 0)
    assert ignored.map_original.mean == 1 > ignored.map_changed.high


def test_p_mrr_is_the_mean_over_documents_of_a_query_and_then_over_queries():
    def query(gone):
        left = dict.fromkeys(sorted(set("abcd") - gone), 1.0)
        return follow_ir.Query(
            "q", follow_ir.Instruction("one", dict.fromkeys("abcd", 1.0)),
            follow_ir.Instruction("two", left), dict.fromkeys("abcd", ""),
        )  # fmt: skip

    rank = {"one": "abcd", "two": "bcad"}
    found = follow_ir.evaluate(
        lambda _, instruction, __: list(rank[instruction]),
        [query(set("ab")), query(set("d")), query(set())],
    )
    # a falls from 1 to 3, b rises from 2 to 1, d stays.
    assert found.p_mrr.mean == pytest.approx(((1 - 1 / 3 + 1 / 2 - 1) / 2 + 0) / 2)
    assert found.queries == 2


def test_a_document_that_is_only_less_relevant_is_ruled_out_too():
    query = follow_ir.Query(
        "q", follow_ir.Instruction("one", {"a": 2.0, "b": 1.0}),
        follow_ir.Instruction("two", {"a": 1.0, "b": 1.0, "c": 1.0}), dict.fromkeys("abc", ""),
    )  # fmt: skip
    assert query.ruled_out == ["a"]


def test_a_language_model_ranks_by_how_likely_true_is():
    def answer(prompt):
        goods = re.search(r"Query: Where were (\w+) sent", prompt)[1]
        text = prompt.split("\n")[0]
        out = re.findall(r"about (\w+) are not", prompt)
        return f" {str(goods in text and not any(city in text for city in out)).lower()}"

    found = follow_ir.evaluate(follow_ir.by_model(Scripted(answer)), QUERIES)
    assert found == follow_ir.evaluate(obeying, QUERIES)


def test_a_ranking_has_every_document_once():
    with pytest.raises(InputError, match="has 11 documents, of 12 to rank; give each of them once"):
        follow_ir.evaluate(lambda _, __, documents: list(documents)[1:], QUERIES)
    with pytest.raises(InputError, match="no query has a document that its changed instruction"):
        follow_ir.evaluate(obeying, [])


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """The queries as they are published."""

    def lines(name, records):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))

    named = {f"q{n}": query for n, query in enumerate(QUERIES)}
    lines("queries.jsonl", [
        {"_id": name, "text": query.text, "instruction_og": query.original.text,
         "instruction_changed": query.changed.text}
        for name, query in named.items()
    ])  # fmt: skip
    pairs = [(name, each, text) for name, q in named.items() for each, text in q.documents.items()]
    lines("corpus.jsonl", [{"_id": f"{n}-{d}", "title": "", "text": text} for n, d, text in pairs])
    lines("top_ranked.jsonl", [{"qid": name, "pid": f"{name}-{d}"} for name, d, _ in pairs])
    for kind, chosen in (("qrels_og", "original"), ("qrels_changed", "changed")):
        (tmp_path / kind).mkdir()
        rows = [f"{name}\t{name}-{d}\t{int(d in getattr(named[name], chosen).gains)}"
                for name, d, _ in pairs]  # fmt: skip
        (tmp_path / kind / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return tmp_path


def test_the_published_files_are_read(folder):
    queries = follow_ir.read(folder)
    assert [query.text for query in queries] == [query.text for query in QUERIES]
    assert [len(query.ruled_out) for query in queries] == [len(q.ruled_out) for q in QUERIES]
    assert follow_ir.evaluate(obeying, queries) == follow_ir.evaluate(obeying, QUERIES)


def test_graded_judgements_are_the_gains_of_ndcg(folder):
    table = folder / "qrels_og/test.tsv"
    lines = table.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("q0\t") and line[-1] == "1")
    lines[first] = lines[first][:-1] + "4"
    table.write_text("\n".join(lines))
    query = follow_ir.read(folder)[0]
    gains = query.original.gains
    assert sorted(gains.values())[-2:] == [1, 4]
    best = max(gains, key=gains.__getitem__)
    irrelevant = [name for name in query.documents if name not in gains]
    ranking = [best, *irrelevant, *(name for name in gains if name != best)]
    found = follow_ir.measure(lambda *_: ranking, query).ndcg_original
    assert len(irrelevant) >= 4  # so that the first five have one gain
    ideal = 4 + sum(1 / math.log2(place + 1) for place in range(2, min(len(gains), 5) + 1))
    assert found == pytest.approx(4 / ideal)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels_og/test.tsv", "query\tdoc\n1\t2\n", "is no table of query-id, corpus-id and score"),
        ("qrels_og/test.tsv", "query-id\tcorpus-id\tscore\nq\td\tx", "is no table of query-id"),
        ("qrels_og/test.tsv", None, r"cannot read .*test\.tsv: No such file"),
        (
            "qrels_og/test.tsv",
            "query-id\tcorpus-id\tscore\nq\td\tnan",
            "between tabs .a score of nan",
        ),
        (
            "corpus.jsonl",
            '{"_id": "q0-0", "text": 7}',
            "record 1 of .* has 7 as 'text', which is no",
        ),
        ("corpus.jsonl", '{"_id": "q0-0", "title": [], "text": ""}', r"has \[\] as 'title'"),
        (
            "queries.jsonl",
            '{"_id": 1, "text": "", "instruction_og": null, "instruction_changed": ""}',
            "has None as 'instruction_og', which is no text",
        ),
        (
            "corpus.jsonl",
            '{"_id": "q0-0", "title": null, "text": ""}',
            "lacks the document q0-1 for the query q0",
        ),
        ("top_ranked.jsonl", '{"qid": "x", "pid": "y"}', "has no documents to rank for the query"),
        ("queries.jsonl", '{"_id": 1}', "has no field 'text'"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(name, text, message, folder):
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        follow_ir.read(folder)


def test_a_collection_that_rules_nothing_out_is_refused_before_it_is_ranked(folder):
    (folder / "qrels_changed/test.tsv").write_text((folder / "qrels_og/test.tsv").read_text())
    with pytest.raises(InputError, match="no query whose changed instruction rules a document out"):
        follow_ir.read(folder)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def ranked(folder, monkeypatch):
    """What `lminf rerank` prints of that collection, and how many queries it ranked."""
    count = 0

    def counted(query, instruction, documents):
        nonlocal count
        count += 1
        return obeying(query, instruction, documents)

    class Model:
        policy = FULL

    monkeypatch.setattr(_model, "load", lambda args: Model())
    monkeypatch.setattr(follow_ir, "by_model", lambda model: counted)

    def run(*words):
        nonlocal count
        count = 0
        rerank.run(cli.parse(["rerank", "m", str(folder), *words]))
        return count

    return run


def test_the_command_prints_means_with_intervals_and_goes_on(ranked, tmp_path, capsys):
    out = tmp_path / "ranks.jsonl"
    assert ranked(f"--out={out}") == 2 * 5
    printed = capsys.readouterr().out
    obeyed = follow_ir.evaluate(obeying, QUERIES)
    assert f"{obeyed.p_mrr.mean:.3f} ({obeyed.p_mrr.low:.3f} to" in " ".join(printed.split())
    lines = out.read_text().splitlines()
    assert len(lines) == 5
    out.write_text("\n".join([*lines[:3], ""]))
    assert ranked(f"--out={out}") == 2 * 2
    assert sorted(out.read_text().splitlines()) == sorted(lines)
    assert ranked(f"--out={out}", "--dtype=bfloat16") == 2 * 5  # rows of another model


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_ranked(ranked, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*; name another folder"):
        ranked(f"--out={tmp_path / 'taken' / 'ranks.jsonl'}")
    assert (tmp_path / "taken").read_text() == ""


def test_the_catalogue_names_the_command():
    with pytest.raises(InputError, match=r"two rankings of .*; `lminf rerank MODEL"):
        catalog.parse("follow_ir:path=x")
