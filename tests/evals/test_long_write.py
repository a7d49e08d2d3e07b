"""Long writing: a published file's requests by length, and a judge's ratings."""

import json

import pytest

from lminf.errors import InputError
from lminf.evals import metrics, runner, writing_quality
from lminf.evals.runner import Cell, Subject
from lminf.evals.suites.long_write import LongBenchWrite, count_words
from lminf.evals.task import Budget
from lminf.lm.scripted import Scripted

RATINGS = {"Relevance": 5, "Accuracy": 4, "Coherence": 3, "Clarity": 2, "Breadth and Depth": 1,
           "Reading Experience": 5}  # fmt: skip


def file_of(folder, lengths, **fields):
    path = folder / "longbench_write.jsonl"
    records = [{"prompt": f"Write {n} words about bees.", "type": "essay", "length": n, **fields}
               for n in lengths]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("two words", 2), ("写一篇文章。", 5), ("用 JAX 写 two words", 5)],
)
def test_words_of_chinese_are_its_characters(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("produced", "score"), [(0, 0), (33, 0), (50, 50), (100, 100), (250, 50), (400, 0), (900, 0)]
)
def test_the_length_is_scored_as_in_the_paper(produced, score):
    """0 at four times and at a third of the length, 50 at 2.5 times and at a half."""
    assert 100 * metrics.length_score(produced, 100) == pytest.approx(score, abs=2)
    above = [metrics.length_score(y, 100) for y in range(100, 420, 20)]
    below = [metrics.length_score(y, 100) for y in range(0, 101, 5)]
    assert above == sorted(above, reverse=True)
    assert below == sorted(below)


def test_the_requests_of_a_file_are_scored_by_the_words_that_they_ask_for(tmp_path):
    path = file_of(tmp_path, (100, 400, 500, 3000))

    def write(prompt):  # half of what is asked
        assert prompt.endswith(" words about bees.\n\n")
        return "w " * (int(prompt.split()[1]) // 2)

    groups = (
        LongBenchWrite(path, max_words=500),
        LongBenchWrite(path, min_words=500, max_words=2000),
    )
    cells = [
        Cell(groups[0], 1000, 2),
        Cell(groups[1], 1000, 1),
        Cell(LongBenchWrite(path), 1000, 4),
    ]
    rows = runner.measure([Subject(Scripted(write), {})], cells, budget=Budget.characters, seed=0)
    assert [row["score"] for row in rows] == [0.5] * 3
    assert groups[0].max_new_tokens == 1600
    assert LongBenchWrite(path).max_new_tokens == 12_000


def test_a_file_without_such_requests_or_with_other_lengths_is_refused(tmp_path):
    path = file_of(tmp_path, (100, 400))
    with pytest.raises(InputError, match=r"no request of 500 to 2000 words; its .* of 100 to 400$"):
        LongBenchWrite(path, min_words=500, max_words=2000).questions()
    with pytest.raises(InputError, match="asks for a text of 'long' words; give a number above 0"):
        LongBenchWrite(file_of(tmp_path, [9], length="long")).questions()
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(InputError, match="has no field 'length'"):
        LongBenchWrite(str(tmp_path / "other.jsonl")).questions()
    task = LongBenchWrite(file_of(tmp_path, [100]))
    with pytest.raises(InputError, match="more than the length 5; ask for a length of at least"):
        task.instances(Budget.characters(5), count=1, key=(0,))


# --- Quality --------------------------------------------------------------------------------------


def test_a_judge_sees_request_and_text_and_its_ratings_are_averaged():
    asked = []

    def judge(prompt):
        asked.append(prompt)
        return f"My ratings:\n{json.dumps(RATINGS)}\nThat is all."

    score = writing_quality.quality(Scripted(judge), "Write about {bees}.", "Bees: {a text}.")
    assert 100 * score == pytest.approx((100 + 75 + 50 + 25 + 0 + 100) / 6)
    assert "Write about {bees}." in asked[0]
    assert "Bees: {a text}." in asked[0]
    assert writing_quality.overall(0.5, score) == pytest.approx((50 + 100 * score) / 200)


def test_the_example_of_the_prompt_is_a_reply():
    prompt = writing_quality.judge_prompt("", "")
    assert writing_quality.parse_ratings(prompt) == dict.fromkeys(writing_quality.SIDES, 3)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("It is good.", "holds no JSON object"),
        ('{"Relevance": 5,', "holds no JSON object"),
        ("{" * 100_000, "holds no JSON object"),
        ("[5, 5, 5, 5, 5, 5]", "holds no JSON object"),
        (
            json.dumps({k: v for k, v in RATINGS.items() if k != "Clarity"}),
            "no rating of 'Clarity'",
        ),
        (json.dumps({**RATINGS, "Accuracy": 6}), "rates 'Accuracy' as 6, not 1 to 5"),
        (json.dumps({**RATINGS, "Accuracy": "4"}), "rates 'Accuracy' as '4', not 1 to 5"),
        (json.dumps({**RATINGS, "Accuracy": True}), "rates 'Accuracy' as True, not 1 to 5"),
    ],
)
def test_a_reply_without_six_ratings_is_refused(reply, problem):
    with pytest.raises(InputError, match=rf"the judge's reply .*{problem}.*; ask a model that"):
        writing_quality.parse_ratings(reply)
