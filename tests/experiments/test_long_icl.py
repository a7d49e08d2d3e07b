"""Many labels in context: what a reader of the prompts scores, and where what is asked stands."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.errors import InputError
from lminf.evals.suites import many_shot
from lminf.experiments import long_icl as experiment
from lminf.lm.prefix import SharedPrefix
from tests.evals import suite_solvers

OPTIONS = {"labels": 6, "rounds": (1, 3), "documents": 2, "policies": ("full",)}


def reader(seen=10**9, preferred=None):
    """Log-probabilities of a model that looks labels up in the last `seen` characters, and that
    writes the preferred label whatever it knows, but then a little more where it is right.
    """

    def following(self, prompts):
        log_probs = np.full((len(prompts), 257), -9.0, np.float32)
        for row, ids in zip(log_probs, prompts, strict=True):
            text = bytes(int(i) for i in ids).decode().rstrip(" ")
            names = re.findall(r"Label: (\w+)", text)
            tool = re.search(r"heard of the (\w+)\.", text)[1]
            tail = text[-seen:]
            if len(re.findall(rf"\b{tool}\b", tail)) > 1:
                row[ord(suite_solvers.labelled(text)[0])] = -1
            if preferred is not None:
                row[ord(names[preferred][0])] += 8.5
        return log_probs

    return following


@pytest.fixture
def words(tmp_path):
    """A text of a hundred words, which is read sooner than the documentation of Python."""
    drawn = ["".join(each) for each in itertools.product("bdfgk", "aeiou", ("ster", "lling"), "sy")]
    lines = [" ".join(["Some", *drawn[n : n + 12], "things."]) for n in range(0, 96, 12)]
    (tmp_path / "words.txt").write_text("\n\n".join(lines))
    return str(tmp_path / "words.txt")


@pytest.fixture
def rows_by(rows_of, monkeypatch, words):
    def measure(following, before=(), **options):
        monkeypatch.setattr(SharedPrefix, "next", following)
        return rows_of("long_icl", before, **{**OPTIONS, "text": words, **options})

    return measure


def test_who_reads_the_examples_knows_every_label(rows_by):
    rows = rows_by(reader())
    assert len(rows) == 2 * 2 * 2 * 4
    assert all(row["right"] == row["questions"] for row in rows)
    for line in experiment.table(rows):
        assert line["accuracy"].startswith("1.00")
    assert all(isinstance(figure, Figure) for figure in experiment.plot(rows).values())


def test_the_quarter_is_where_the_example_stands_that_tells_the_label(rows_by):
    """Who reads the last 250 characters, about four examples of 18, knows late ones only."""
    rows = rows_by(reader(seen=250), rounds=(3,), documents=3, orders=("grouped",))
    share = {quarter: sum(row["right"] for row in rows if row["quarter"] == quarter)
             / sum(row["questions"] for row in rows if row["quarter"] == quarter)
             for quarter in (1, 4)}  # fmt: skip
    # Who knows nothing answers the first label: 1 of 6, which the first quarter has.
    assert share[4] > 0.5 >= share[1]
    assert sum(row["questions"] for row in rows) == 3 * 6


def test_calibration_takes_out_what_is_preferred_whatever_is_asked(rows_by):
    rows = rows_by(reader(preferred=-1), rounds=(1,), orders=("grouped",))
    assert sum(row["right"] for row in rows) == 2  # the last label, once in each document
    assert sum(row["right_calibrated"] for row in rows) == 2 * 6
    (line,) = experiment.table(rows)
    assert (line["chance"], line["accuracy"], line["calibrated"]) == ("0.17", "0.17", "1.00")
    assert line["answers from quarter 4"] == "1.00"


def test_orders_and_rounds_ask_the_same_questions_of_the_same_examples(random_lm, words):
    config = ConfigDict({"model": "m", "seed": 0, "labels": 6, "rounds": (2,), "text": words})
    document = experiment.drawn(config, random_lm, 0)
    again = experiment.drawn(config, random_lm, 0)
    assert document == again != experiment.drawn(config, random_lm, 1)
    assert len({name[0] for name in document.names}) == 6  # bytes tell labels by their first letter
    assert bytes(document.lead) == b" "
    grouped = many_shot.order_examples(document.examples, "grouped")
    assert sorted(grouped) == sorted(document.examples) != grouped
    assert [each.label for each in grouped] == sorted(each.label for each in grouped)


def test_a_run_goes_on_in_the_middle_of_a_prompt(rows_by):
    rows = rows_by(reader())
    rest = rows_by(reader(), rows[:5])

    def known(row):
        return {name: value for name, value in row.items() if name != "seconds"}

    assert list(map(known, rows[:5] + rest)) == list(map(known, rows))
    assert rows_by(reader(), rows) == []


def test_labels_that_the_tokenizer_begins_alike_are_refused(rows_by):
    with pytest.raises(InputError, match=r"of tiny begins many labels .* --config\.labels=14 or"):
        rows_by(reader(), labels=20)


def test_an_order_that_there_is_not_is_refused(rows_by):
    with pytest.raises(InputError, match="there is no order 'sorted'"):
        rows_by(reader(), orders=("shuffled", "sorted"))


@pytest.mark.slow
def test_a_model_is_asked(rows_of, words):
    rows = rows_of("long_icl", **{**OPTIONS, "text": words, "rounds": (1,), "documents": 1})
    assert sum(row["questions"] for row in rows) == 2 * 6
