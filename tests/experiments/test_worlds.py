"""Experiments on worlds: what a row of training holds, and when an answer counts as right."""

import collections

import jax
import numpy as np
import pytest

from lminf.data.worlds import impossible
from lminf.errors import InputError
from lminf.experiments import _worlds, impossible_languages, knowledge_extraction
from lminf.experiments.knowledge_extraction import HELD_OUT, Mixed
from lminf.run import request

BIOGRAPHIES = [np.array([5, 6, 7, 0]), np.array([8, 9, 0])]
QUESTIONS = [np.array([3, 0]), np.array([4, 0])]


def test_rows_are_whole_documents_of_one_kind_with_their_ends():
    data = Mixed(BIOGRAPHIES, QUESTIONS, 0.25, length=20, rows=4, seed=3)
    kinds = []
    for step in range(100):
        batch = data.batch(step)
        assert batch["tokens"].shape == batch["targets"].shape == (4, 20)
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            row = [*tokens.tolist(), int(targets[-1])]
            documents = " ".join(map(str, row)).removeprefix("0 ").split(" 0")
            whole = {document.strip() for document in documents[:-1]}
            kinds.append(whole <= {"3", "4"})
            assert whole <= {"3", "4"} or whole <= {"5 6 7", "8 9"}
    # Four standard deviations of a share of 400.
    assert abs(np.mean(kinds) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    again = Mixed(BIOGRAPHIES, QUESTIONS, 0.25, length=20, rows=4, seed=3).batch(99)
    np.testing.assert_array_equal(again["tokens"], data.batch(99)["tokens"])


def test_padded_rows_predict_each_word_from_those_before_it():
    tokens, targets, there = _worlds.padded([np.array([5, 6, 7]), np.array([8])])
    assert tokens.tolist() == [[0, 5, 6], [0, 8, 0]]
    assert targets.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert there.tolist() == [[True] * 3, [True, False, False]]


def test_an_answer_is_right_where_each_of_its_words_is_the_likeliest(monkeypatch):
    best = np.array([[[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]], bool)
    monkeypatch.setattr(_worlds, "measure", lambda *_: (None, best))
    copies = type("Copies", (), {"seeds": (0,)})()
    spans = np.array([[[0, 2], [1, 3], [3, 5]], [[0, 2], [1, 4], [3, 5]]])
    documents = [np.arange(1, 6), np.arange(1, 6)]
    exact, first = knowledge_extraction.right(copies, None, documents, spans)  # pyright: ignore
    assert exact.tolist() == [[[True, False, True], [False, True, False]]]
    assert first.tolist() == [[[True, True, True], [False, True, True]]]


def test_a_table_stands_beside_the_published_numbers():
    rows = [
        {"augmentation": "single", "scale": "published", "measure": HELD_OUT, "accuracy": 0.097},
        *({"augmentation": "single", "scale": "scaled down", "measure": HELD_OUT, "seed": seed,
           "attribute": attribute, "accuracy": (seed + place) / 10}
          for seed in (0, 1) for place, attribute in enumerate("abc")),
    ]  # fmt: skip
    assert knowledge_extraction.table(rows) == [
        {"right values": HELD_OUT, "single, scaled down": "0.15 (0.10–0.20)",
         "single, published": 0.097},
    ]  # fmt: skip


def test_generated_sentences_are_not_counted_where_a_text_is_read():
    words = ["--config=impossible_languages:tiny", "--config.text=a.txt", "--config.sentences=9"]
    asked = request.parse("impossible_languages", words)
    assert asked is not None
    with pytest.raises(InputError, match=r"--config\.sentences counts those of the grammar"):
        impossible_languages.check(asked.config, asked.overrides)


def test_a_flip_counts_where_both_prefixes_of_a_pair_were_predicted_rightly(monkeypatch):
    language = impossible.TokenHop()
    pairs = impossible.number_pairs(language, range(40), seed=0)
    world = impossible.world(impossible.sentences(300, seed=0), language, held_out=9)
    ids = world.encode(impossible.MARKERS[1:])
    plural = {tuple(world.encode(pair.plural)) for pair in pairs}
    wrong = set(list(plural)[:3])

    def predicted(copies, params, arrays, markers, positions):
        """A model that reads the number of the state at the verb's fourth word, of layer 1 only."""
        assert markers.tolist() == ids.tolist()
        made = np.zeros((1, 2, len(positions)), bool)
        for i, place in enumerate(positions.tolist()):
            prefixes = [tuple(arrays[name][i, 1 : arrays["last"][i] + 1])
                        for name in ("base", "source")]  # fmt: skip
            base, source = (each in plural and each not in wrong for each in prefixes)
            made[0, :, i] = base
            if place == arrays["last"][i]:
                made[0, 1, i] = source
        return made

    monkeypatch.setattr(impossible_languages, "_plural_predicted", predicted)
    copies = type("Copies", (), {"seeds": (7,)})()
    places = impossible_languages.places_of(language)
    rows = list(impossible_languages.flips(copies, None, world, pairs, places))  # pyright: ignore
    assert [row["place"] for row in rows[::2]] == [
        "subject", "verb", "verb + 1", "verb + 2", "verb + 3", "last before the marker"
    ]  # fmt: skip
    for row in rows:
        flips = row["place"] == "last before the marker" and row["layer"] == 1
        assert row["flipped"] == float(flips)
        assert row["seed"] == 7
        assert row["prefixes"] == 2 * (len(pairs) - 3)


@pytest.fixture
def trained(rows_of):
    """`rows_of` where optax may mix dtypes."""

    def measure(*args, **fields):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return rows_of(*args, **fields)

    return measure


@pytest.mark.slow
def test_languages_that_are_finished_are_not_trained_again(trained):
    names = ("control", "no_hop")
    made = trained("impossible_languages", languages=names, replicates=1)
    rows = [row for row in made if "place" not in row]
    assert [(row["language"], row["step"]) for row in rows] == [
        (name, step) for name in names for step in (10, 20)
    ]
    exchanges = [row for row in made if "place" in row]
    assert [(row["language"], row["place"], row["layer"]) for row in exchanges] == [
        ("no_hop", place, layer) for place in ("subject", "verb") for layer in (0, 1)
    ]
    for first, last in (rows[:2], rows[2:]):
        assert 1 < last["perplexity"] < first["perplexity"]
    assert [row.get("markers", 0) > 0 for row in rows] == [False, False, True, True]
    assert trained("impossible_languages", made, languages=names, replicates=1) == []
    # Of a language whose perplexities are there, only the exchanged states are measured.
    again = trained("impossible_languages", rows, languages=names, replicates=1)
    assert again == exchanges
    control, no_hop = impossible_languages.table(rows)
    assert control["perplexity"].startswith(f"{rows[1]['perplexity']:.2f}")
    assert no_hop["times its control"] == "1.00 (1.00–1.00)"


@pytest.mark.slow
def test_everything_is_measured_of_every_attribute_and_seed(trained):
    rows = trained("knowledge_extraction", augmentations=("multi5+permute",))
    ours = [row for row in rows if row["scale"] == "scaled down"]
    counts = collections.Counter((row["measure"], row["n"]) for row in ours)
    assert counts == {
        ("biographies", 16): 12, ("questions trained on", 8): 12, ("questions of test people", 8):
        12, ("P-probe at the first value", 8): 12, ("Q-probe", 8): 12,
    }  # fmt: skip
    assert all(0 <= row["accuracy"] <= row.get("first_word", 1) <= 1 for row in ours)
    assert trained("knowledge_extraction", rows, augmentations=("multi5+permute",)) == []
