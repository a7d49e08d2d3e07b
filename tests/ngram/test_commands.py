"""`lminf ngram`: from texts to answers, and what it refuses."""

import json

import pytest

from lminf import cli

TEXTS = {
    "one.txt": "the cat sat on the mat and the cat ran",
    "two.txt": "a dog sat on the mat",
    "three.txt": "seven wise owls read an old book by night",
}


@pytest.fixture
def index(tmp_path, capsys):
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    folder = str(tmp_path / "index")
    files = [str(tmp_path / name) for name in TEXTS]
    cli.main(["ngram", "build", folder, *files, "--tokenizer=bytes"])
    slots = sum(map(len, TEXTS.values())) + len(TEXTS) + 1  # separators
    assert f"{slots} slots in 3 documents" in capsys.readouterr().out
    return folder


@pytest.fixture
def answers(index, capsys):
    def ask(verb, *words):
        cli.main(["ngram", verb, index, *words, "--json"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return ask


def test_it_counts_and_tells_what_follows(answers):
    assert [row["count"] for row in answers("count", "the cat", "zebra")] == [2, 0]
    assert [row["count"] for row in answers("count", "--ids", "116,104,101", "116 65535")] == [4, 2]
    (row,) = answers("prob", "the c")
    assert (row["prompt_count"], row["count"]) == (4, 2)
    (row,) = answers("ntd", " the ")
    assert row["tokens"] == {"109": 2, "99": 1}
    (row,) = answers("infgram", "zebras sat on the ")
    assert row["suffix"] == "s sat on the " or row["suffix"] == " sat on the "
    assert row["tokens"] == {"109": 2}


def test_it_shows_documents_and_spans(answers, tmp_path):
    (row,) = answers("docs", "wise", "--k=1")
    assert row["text"] == TEXTS["three.txt"]
    assert row["metadata"]["path"].endswith("three.txt")
    asked = tmp_path / "asked.txt"
    asked.write_text("my cat sat on the mat")
    spans = answers("attribute", str(asked), "--min-len=10")
    assert [(row["span"], row["occurrences"]) for row in spans] == [(" cat sat on the mat", 1)]
    (row,) = answers("decontaminate", str(tmp_path / "two.txt"))
    assert row["metadata"]["path"].endswith("two.txt")
    assert row["share"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuont", "x", "y"], "no verb 'cuont'; did you mean 'count'"),
        (["count", "INDEX", "--ids", "1,two"], "is no list of token ids"),
        (["count", "INDEX", "--ids", ","], "a text is empty"),
        (["count", "INDEX", "--ids", "116 300"], "token id 300 is beyond the tokenizer bytes of"),
        (["prob", "INDEX", "--ids", "116 70000"], "whose ids are 0 to 256; give ids of its"),
        (["prob", "INDEX", "t"], "is one token; give at least one before the last"),
        (["docs", "INDEX", "t", "--k=0"], "--k=0: give"),
        (["docs", "INDEX", "zebra"], "does not occur"),
        (["count", "NONE", "t"], "holds no index"),
        (["build", "NONE", "INDEX"], "name a --tokenizer"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(words, message, index, tmp_path, capsys):
    words = [index if word == "INDEX" else word for word in words]
    words = [str(tmp_path / "none") if word == "NONE" else word for word in words]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ngram", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
