"""Reduced contexts: budgets to the token, what each method keeps, and what is refused."""

import math

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.lm import bm25
from lminf.lm.budget import Budget
from lminf.lm.scripted import Scripted
from lminf.programs import reduce_by_model
from lminf.programs.reduce import BM25, Reader, Truncation, chunks
from lminf.programs.reduce_by_model import Segments, SemanticDeletion, Summary
from lminf.programs.segment_reading import KeyContext
from lminf.ranges import Range
from tests.stated_ranges import outside, without_range

QUESTION = "\nWhere do bees live?"
TEXT = (
    "Rivers run to the sea. A bee lives in a hive of wax. Cats sleep all day long.\n\n"
    "Bees live in hives near flowers. Dogs bark at night. Über den Wolken ist es schön."
)
MODEL = Scripted(lambda prompt: "Bees live in hives. They eat honey, and more of it every day.")


# Prose of some hundred words.
LONGER = " ".join((reduce_by_model.SemanticDeletion.__doc__ or "").split())


def bytes_of(size):
    return Budget(size, str.encode, "bytes")


def words_of(size):
    return Budget(size, str.split, "words")


METHODS = [
    Truncation("end"), Truncation("start"), Truncation("middle"), BM25(words=4),
    SemanticDeletion(MODEL), SemanticDeletion(MODEL, span=5), Summary(MODEL),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
@pytest.mark.parametrize("make", [bytes_of, words_of])
def test_no_budget_is_ever_exceeded_and_what_fits_is_kept(method, make):
    question = make(1).count(QUESTION)
    whole = make(1).count(TEXT + QUESTION)
    for size in range(question + 1, whole, 7):
        text = method.reduce(TEXT, QUESTION, make(size))
        assert make(size).count(text + QUESTION) <= size
        assert text == method.reduce(TEXT, QUESTION, make(size))
    assert method.reduce(TEXT, QUESTION, make(whole)) == TEXT


@pytest.mark.parametrize(
    ("cut", "kept"),
    [("end", TEXT[:21]), ("start", TEXT[-21:]), ("middle", TEXT[:11] + TEXT[-10:])],
)
def test_truncation_fills_the_budget(cut, kept):
    budget = Budget.characters(21 + len(QUESTION))
    assert Truncation(cut).reduce(TEXT, QUESTION, budget) == kept


def test_bm25_is_its_formula():
    documents = ["the bee the hive", "the sea", "a bee and a bee and a cat"]
    lengths, k1, b = [4, 2, 8], 1.2, 0.75

    def term(tf, length, having):
        idf = math.log(1 + (3 - having + 0.5) / (having + 0.5))
        return idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / (14 / 3)))

    expected = [
        term(1, lengths[0], 2) + term(1, lengths[0], 1),
        0.0,
        term(2, lengths[2], 2) + 0.0,
    ]
    np.testing.assert_allclose(bm25.scores(documents, "Bee HIVE?"), expected, rtol=1e-12)


def test_bm25_keeps_the_chunks_that_are_asked_about_in_the_order_of_the_text():
    parts = chunks(TEXT, 5)
    assert "".join(parts) == TEXT
    budget = bytes_of(len((QUESTION + parts[2] + parts[3]).encode()) + 8)
    kept = BM25(words=5).reduce(TEXT, QUESTION, budget)
    assert "Bees live" in kept
    places = [TEXT.index(part) for part in parts if part in kept]
    assert places == sorted(places)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_deletion_has_exactly_its_rate(rate):
    words = TEXT.split()
    kept = SemanticDeletion(MODEL).delete(TEXT, rate).split()
    assert len(kept) == len(words) - round(rate * len(words))
    remaining = iter(words)
    assert all(word in remaining for word in kept)  # in their order


def test_one_round_deletes_the_words_of_least_importance():
    words = [" " + word for word in TEXT.split()]
    importance = SemanticDeletion(MODEL).importance(words)
    gone = set(np.argsort(importance, kind="stable")[: len(words) // 4].tolist())
    kept = SemanticDeletion(MODEL, rounds=1).delete("".join(words), len(words) // 4 / len(words))
    assert kept == "".join(word for index, word in enumerate(words) if index not in gone)


def test_a_words_importance_is_what_the_embedding_loses_without_it():
    words = [" a", " bee", " buzzes"]
    whole, without = MODEL.embed([" a bee buzzes", " a buzzes"]).astype(np.float64)
    cosine = whole @ without / np.linalg.norm(whole) / np.linalg.norm(without)
    assert SemanticDeletion(MODEL).importance(words)[1] == pytest.approx(1 - cosine)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_deletion_is_nearer_the_text_than_random_deletion_at_equal_rate(rate):
    """Of one round it is not, with this embedding: the least important words move it alike."""
    words = LONGER.split()
    count = round(rate * len(words))

    def similarity(text):
        whole, shorter = MODEL.embed([" " + LONGER, " " + text]).astype(np.float64)
        return whole @ shorter

    random = np.random.default_rng(0)
    drawn = []
    for _ in range(60):
        gone = set(random.permutation(len(words))[:count].tolist())
        drawn.append(similarity(" ".join(w for i, w in enumerate(words) if i not in gone)))
    ours = similarity(" ".join(SemanticDeletion(MODEL).delete(LONGER, rate).split()))
    assert ours > np.quantile(drawn, 0.9)


def test_a_summary_is_what_the_model_writes_until_the_budget_ends():
    budget = bytes_of(25 + len(QUESTION.encode()))
    assert Summary(MODEL).reduce(TEXT, QUESTION, budget) == "Bees live in hives. They"
    with pytest.raises(InputError, match="the model wrote no summary of 'Rivers run"):
        Summary(Scripted(lambda prompt: " \n")).reduce(TEXT, QUESTION, budget)


def test_segments_are_the_surest_of_segment_reading(lm, monkeypatch):
    asked = []

    def select_segments(model, ids, how, *, room):
        asked.append((bytes(ids.tolist()).decode(), how, room))
        kept = np.concatenate([ids[5:15], ids[len(ids) - how.question_len :]])
        return KeyContext(kept, (), np.zeros(0), ())

    monkeypatch.setattr(reduce_by_model.segment_reading, "select_segments", select_segments)
    budget = Budget(60, lambda text: lm.encode(text)[0], "tokens")
    kept = Segments(lm, segment_len=10).reduce(TEXT, QUESTION, budget)
    ((prompt, how, room),) = asked
    assert (prompt, how.question_len, room) == (TEXT + QUESTION, len(QUESTION), 60)
    assert kept == TEXT[5:15]
    with pytest.raises(InputError, match="head, segment and question take 70 tokens and the"):
        Segments(lm, segment_len=50).reduce(TEXT, QUESTION, budget)


def test_a_reader_answers_from_the_reduced_context():
    echo = Scripted(lambda prompt: prompt)
    reader = Reader(
        echo, Truncation("end"), Budget.characters(30), lambda prompt: (prompt[:-19], prompt[-19:])
    )
    (answer,) = reader.generate([TEXT + QUESTION[1:]], max_new_tokens=100)
    assert answer == TEXT[:11] + QUESTION[1:]


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("context", "question", "size", "message"),
    [
        ("", QUESTION, 90, "the context is empty; ask the question without"),
        ("\n ", QUESTION, 90, "the context is empty; ask the question without"),
        (TEXT, "", 90, "the question is empty; give what is asked"),
        (TEXT, QUESTION, 20, "the question takes 20 bytes and the budget is 20, .* at least 21"),
    ],
)
def test_what_cannot_be_reduced_is_refused(method, context, question, size, message):
    with pytest.raises(InputError, match=message):
        method.reduce(context, question, bytes_of(size))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="truncation of the 'left'; use end, start, middle"):
        Truncation("left")
    with pytest.raises(InputError, match=r"rate=1\.2 of words to delete; give a share"):
        SemanticDeletion(MODEL).delete(TEXT, 1.2)
    with pytest.raises(InputError, match="compares embeddings, which object does not give"):
        SemanticDeletion(object())
    assert without_range(BM25) == []
    assert isinstance(BM25.__annotations__["k1"].__metadata__[0], Range)
    for field, value in outside(BM25):
        with pytest.raises(InputError, match=rf"BM25\.{field} is "):
            BM25(**{field: value})
