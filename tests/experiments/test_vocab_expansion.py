"""Rows of an extended vocabulary from a small model: what they say, and how a run goes on."""

import json

import pytest

from lminf.errors import InputError
from lminf.experiments import _texts
from lminf.experiments import vocab_expansion as experiment
from lminf.run import request


@pytest.fixture
def texts(tmp_path):
    """(words of one script, words of another), as pages of HTML and of plain text."""
    greek, latin = tmp_path / "greek", tmp_path / "latin"
    for folder, words in ((greek, "γάτα σκύλος χαλί δρόμος"), (latin, "cat dog mat road")):
        folder.mkdir()
        for page in range(6):
            line = f"{page} " + " ".join(words.split() * 8)
            (folder / f"{page}.html").write_text(
                f"<html><script>var x = '{'y' * 60}';</script><p>{line}</p><a>menu</a></html>"
            )
    return f"{greek}/*.html", f"{latin}/*.html"


def options(texts):
    return {
        "text": texts[0], "other_text": texts[1], "tokens": (7,), "rows": ("mean", "random"),
        "replicates": 2, "documents": 2, "characters": 60, "sample_characters": 1000,
        "steps": (), "mtp_rows": (),
    }  # fmt: skip


def test_pages_are_their_paragraphs_without_scripts_and_menus(texts):
    pages = _texts.pages(texts[1])
    assert len(pages) == 6
    assert all("cat dog" in page and "yyy" not in page for page in pages)
    assert not any("menu" in page for page in pages)


@pytest.mark.slow
def test_new_tokens_shorten_their_language_alone(rows_of, texts):
    rows = rows_of("vocab_expansion", **options(texts))
    assert len(rows) == (1 + 1 + 2) * 2 * 2
    lines = {line["rows"]: line for line in experiment.table(rows)}
    assert set(lines) == {"none", "mean", "random"}
    assert float(lines["mean"]["characters a token"]) > float(lines["none"]["characters a token"])
    assert float(lines["mean"]["tokens a sentence"]) < float(lines["none"]["tokens a sentence"])
    assert lines["none"]["above the model without"] is None
    others = {(r["rows"], r["characters_per_token"]) for r in rows if r["language"] == "other"}
    assert len({length for _, length in others}) == 1


def test_a_stopped_run_measures_what_is_missing(rows_of, texts):
    rows = rows_of("vocab_expansion", **options(texts))
    missing = rows_of("vocab_expansion", rows[:3], **options(texts))
    assert json.dumps(missing) == json.dumps(rows[3:])
    assert rows_of("vocab_expansion", rows, **options(texts)) == []


def test_trained_models_are_measured_after_their_steps_and_no_step_twice(
    rows_of, texts, monkeypatch
):
    trainings = []

    def train(c, model, sample, *, mtp_heads, steps):
        trainings.append((mtp_heads, tuple(steps)))
        return dict.fromkeys(steps, model)

    monkeypatch.setattr(experiment, "train", train)
    fields = {**options(texts), "rows": ("mean",), "steps": (3, 5), "mtp_rows": ("mean",)}
    rows = rows_of("vocab_expansion", **fields)
    assert trainings == [(0, (3, 5)), (1, (3, 5))]
    versions = [(row["rows"], row["mtp_heads"], row["steps"]) for row in rows[::4]]
    assert versions == [("none", 0, 0), *(("mean", 0, n) for n in (0, 3, 5)),
                        *(("mean", 1, n) for n in (3, 5))]  # fmt: skip
    assert [line.get("above without heads") for line in experiment.table(rows)][-2:] != [None] * 2
    assert set(experiment.plot(rows)) == {"vocab_expansion", "vocab_expansion_training"}
    trainings.clear()
    rows_of("vocab_expansion", rows[:14], **fields)
    assert trainings == [(0, (5,)), (1, (3, 5))]


def test_sentences_end_at_stops_questions_and_lines():
    assert experiment.sentences("Ένα. Δύο; Τρία\nFour 4.5 e.g. five!\n") == 4 + 1  # after e.g. too


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": (), "mtp_rows": ("mean",)}, "further heads are of training alone; give"),
        ({"mtp_rows": ("maen",)}, "mtp_rows holds 'maen'; did you mean 'mean'"),
    ],
)
def test_further_heads_that_cannot_be_are_refused(fields, message):
    config = request.parse("vocab_expansion", ["--config=vocab_expansion:tiny"]).config
    config.update(fields)
    with pytest.raises(InputError, match=message):
        experiment.check(config)


def test_too_few_pages_are_refused(rows_of, texts):
    with pytest.raises(InputError, match="has 6 pages of 60 characters, but 9 were asked for"):
        rows_of("vocab_expansion", **{**options(texts), "documents": 9})
