"""Words in units, and when a word counts as right."""

import dataclasses

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import _words, word_pooling
from lminf.experiments._words import STOP, UNKNOWN
from lminf.models import spec
from lminf.run import request

TEXT = "the cat, the dog. the catastrophe: ωδή " * 30 + "Ω cat 12"


def config(**fields):
    parsed = request.parse("word_pooling", ["--config=word_pooling:tiny"])
    assert parsed is not None
    parsed.config.update(fields)
    return parsed.config


@pytest.fixture(scope="module")
def words():
    return _words.rows_of(TEXT, words=4, longest=6, held_out=0.05)


def test_rows_hold_the_text_word_by_word(words):
    rows = [" ".join(words.types[index] for index in row) for row in words.rows]
    sentence = ["the", "cat", ",", "the", "dog", ".", "the", "catast", ":", "ωδή"] * 2
    assert sorted(rows) == sorted(
        15 * [" ".join(sentence[start : start + 4]) for start in range(0, 20, 4)]
    )  # 300 of 303 words
    assert rows != sorted(rows)
    assert words.train == 75 - round(75 * 0.05)


@pytest.mark.parametrize("kind", ["byte", "character", "subword"])
def test_words_are_spelled_apart_and_end(words, kind):
    units = _words.in_units(kind, words, vocab=30)
    assert len(np.unique(units.spelled, axis=0)) == len(words.types)
    assert units.spelled.max() < units.size
    assert units.known.all()
    cat = units.spelled[words.types.index("cat")]
    if kind == "byte":
        assert cat[:5].tolist() == [b + 2 for b in b"cat"] + [STOP, -1]
        assert (units.spelled[words.types.index("ωδή")] >= 0).sum() == 7
    if kind == "character":
        assert (units.spelled[words.types.index("ωδή")] >= 0).sum() == 4
        assert units.within[words.types.index("cat")].tolist() == [*cat[:3], -1, -1, -1]
    if kind == "subword":
        # "the" is so frequent that one subword is the word with its end.
        assert (units.spelled[words.types.index("the")] >= 0).sum() == 1
        assert STOP not in units.spelled


def test_what_training_has_no_character_of_is_unknown():
    words = _words.rows_of("the cat the cat the cat the Ωat", words=2, longest=6, held_out=0.25)
    rows = words.rows[np.argsort((words.rows == words.types.index("Ωat")).any(-1))]  # it is last
    units = _words.in_units("character", dataclasses.replace(words, rows=rows), vocab=0)
    known = {word: bool(known) for word, known in zip(words.types, units.known, strict=True)}
    assert known == {"the": True, "cat": True, "Ωat": False}
    assert units.spelled[words.types.index("Ωat")][0] == UNKNOWN


def test_a_word_is_right_where_all_its_units_are_the_likeliest(words):
    units = _words.in_units("byte", words, vocab=0)
    shape = spec.llama(
        vocab_size=units.size, width=16, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=16,
        trained_length=64,
    )  # fmt: skip
    model = word_pooling.Flat(shape, units, longest=40)
    row = [words.types.index(word) for word in ("the", "cat", ",", "the")]
    batch = model.batch(np.array([row, row]))
    row = b"the\0cat\0,\0the\0"
    assert batch["tokens"][0, : len(row) - 1].tolist() == [b + 2 if b else STOP for b in row[:-1]]
    assert batch["targets"][0, : len(row) - 1].tolist() == [b + 2 if b else STOP for b in row[1:]]
    assert batch["word"][0].tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 4 + [-1] * 26
    best = np.ones(batch["targets"].shape, bool)
    nats = np.arange(best.size, dtype=np.float64).reshape(best.shape)
    model.__dict__["_judge"] = lambda params, batch: (best, nats)
    right, of_words = model.judge({}, batch)
    assert right.tolist() == [[False, True, True, True]] * 2
    sums = [sum(range(3, 7)), sum(range(7, 9)), sum(range(9, 13))]
    assert of_words.tolist() == [[0, *sums], [0, *(sums[i] + 39 * (4, 2, 4)[i] for i in range(3))]]
    best[0, 6] = False  # the end of "cat"
    best[0, 20] = False  # padding
    best[1, :2] = False  # of the first word, and that is not asked
    right, _ = model.judge({}, batch)
    assert right.tolist() == [[False, False, True, True], [False, True, True, True]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("subwrd",)}, "no model is called 'subwrd'; did you mean 'subword'"),
        ({"words": 1}, "a row needs a word and the next; give 2"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        word_pooling.check(config(**fields))


def test_texts_that_are_too_short_are_refused(words):
    with pytest.raises(InputError, match="the text has 3 words, which are 1 rows of 3; name a lon"):
        _words.rows_of("one two three", words=3, longest=6, held_out=0.1)
    with pytest.raises(InputError, match=r"vocabulary of \d+ subwords, not 900; give more text"):
        _words.in_units("subword", words, vocab=900)


def test_the_table_pairs_models_by_seed():
    rows = [
        {"model": model, "seed": seed, "parameters": 9, "positions": 2.0, "words": bucket,
         "accuracy": value + seed / 10, "nats": 10 * value - seed}
        for model, value in (("word pooling", 0.3), ("subword", 0.2))
        for seed in (0, 1) for bucket in ("never", "all words")
    ]  # fmt: skip
    pooled, subword, nats, _ = word_pooling.table(rows)
    assert pooled["all words"].startswith("35.0 (")
    assert pooled["all words, above subword"] == "10.0 (10.0 to 10.0)"
    assert "all words, above subword" not in subword
    assert nats["measure"] == "nats a word"
    assert nats["all words"].startswith("2.50 (")
    assert nats["all words, above subword"] == "1.00 (1.00 to 1.00)"


@pytest.mark.slow
def test_every_model_is_measured_and_finished_ones_are_not_trained_again(rows_of):
    models = {"models": ("word pooling", "byte")}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("word_pooling", **models)
        assert rows_of("word_pooling", rows, **models) == []
    for model in models["models"]:
        own = [row for row in rows if row["model"] == model]
        assert {row["seed"] for row in own} == {0, 1}
        for seed in (0, 1):
            counts = {row["words"]: row["n"] for row in own if row["seed"] == seed}
            of_times = [n for bucket, n in counts.items() if bucket not in ("numbers", "all words")]
            assert sum(of_times) == counts["all words"] == 8 * 4
    read = {(row["seed"], row["words"]): row["n"] for row in rows if row["model"] == "byte"}
    assert read == {(row["seed"], row["words"]): row["n"] for row in rows
                    if row["model"] == "word pooling"}  # fmt: skip
