"""Every generated task: solved by reading its prompt, at chance by guessing, filling its budget."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.evals import runner
from lminf.evals.runner import Cell, Subject
from lminf.evals.suites import ada_leval, catalog, generated, needle_threading, prose, published
from lminf.evals.suites.long_write import LongWrite
from lminf.evals.suites.many_shot import ManyShot
from lminf.evals.task import Budget
from lminf.lm.scripted import Scripted
from tests.evals import suite_solvers

# Those whose prompts fill a budget.
GENERATED = [
    kind.name
    for kind in catalog.KINDS
    if issubclass(kind, generated.GeneratedTask) and kind is not LongWrite
]
LENGTH = 6_000  # characters
WORDS = [a + b + c for a, b, c in itertools.product(
    ("tar", "mel", "sop", "ling", "dra", "ove", "ki", "bu"), ("ed", "in", "as", "or", "um", "et"),
    ("a", "ish", "on", "ik", "us", "em", "o", "ir", "ur", "y"))]  # fmt: skip


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """A file of 300 paragraphs of made-up prose, each sentence of it once."""
    drawn = random.Random(0)

    def sentence():
        words = [drawn.choice(WORDS) for _ in range(drawn.randint(6, 11))]
        return " ".join([words[0].capitalize(), *words[1:]]) + "."

    paragraphs = [" ".join(sentence() for _ in range(drawn.randint(2, 4))) for _ in range(300)]
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    return str(path)


@pytest.fixture
def tasks_of(book):
    """The tasks of a name at its levels, with the book in place of the machine's own text."""

    def parse(name):
        kind = catalog.TASKS[name]
        return catalog.parse(f"{name}:text={book}" if "text" in kind.__annotations__ else name)

    return parse


def solver_of(name, book):
    if name == "tsort":
        return suite_solvers.sorter(" ".join(prose.paragraphs(book)))
    if name == "best_answer":
        return suite_solvers.next_passage(prose.paragraphs(book))
    return suite_solvers.SOLVERS[name]


def rows_of(tasks, answer, *, length=LENGTH, count=3):
    subject = Subject(Scripted(answer), {"model": "scripted"})
    cells = [Cell(task, length, count) for task in tasks]
    return list(runner.measure([subject], cells, budget=Budget.characters, seed=0))


def items_of(task, length=LENGTH, count=6, key=(0, 1)):
    return task.instances(Budget.characters(length), count=count, key=key)


# --- What every task promises ---------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_who_reads_the_prompt_answers_everything(name, tasks_of, book):
    for row in rows_of(tasks_of(name), solver_of(name, book)):
        assert row["score"] == 1, row


@pytest.mark.parametrize("name", GENERATED)
def test_who_says_nothing_is_right_about_nothing(name, tasks_of):
    for row in rows_of(tasks_of(name), lambda prompt: "?", count=3):
        assert row["score"] == 0, row


# Of the parts that a haystack is made of, the longest in characters.
LONGEST_PART = {
    "single_needle": 82, "multi_needle": 82, "conditional_needle": 82, "single_thread": 82,
    "multi_thread": 82, "branched_thread": 82, "common_words": 3 * 14, "tsort": 4 * 12,
    "many_shot": 80, "m4le": 60, "long_ins": 90,
}  # fmt: skip
PARAGRAPH, SENTENCE = 420, 120  # the longest of the book


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("length", [5001])
def test_a_prompt_fills_its_budget_to_within_one_part(name, length, tasks_of):
    of_prose = PARAGRAPH if name in ("document_qa", "best_answer") else SENTENCE
    for task in tasks_of(name):
        for item in items_of(task, length, count=2):
            assert item.tokens == len(item.prompt)
            assert length - LONGEST_PART.get(name, of_prose) < item.tokens <= length
            assert item.cut == 0


@pytest.mark.parametrize("name", GENERATED)
def test_the_same_key_draws_the_same_and_another_key_does_not(name, tasks_of):
    task = tasks_of(name)[-1]
    first = items_of(task, count=3)
    assert items_of(task, count=2) == first[:2]
    assert len({item.prompt for item in [*first, *items_of(task, count=3, key=(1, 1))]}) == 6


@pytest.mark.parametrize("name", GENERATED)
def test_a_budget_that_holds_no_instance_is_refused_with_the_least_that_does(name, tasks_of):
    for task in tasks_of(name):
        message = rf"^{name}\b.*: a prompt with .* a length of at least (\d+)$"
        with pytest.raises(InputError, match=message) as refusal:
            items_of(task, 60, count=1)
        least = int(str(refusal.value).split()[-1])
        assert items_of(task, least, count=1)


@pytest.mark.parametrize("kind", catalog.KINDS, ids=lambda kind: kind.name)
def test_a_field_has_no_name_of_another_column(kind):
    others = {"task", "length", "model", "policy", "instances", "score", "low", "high", "unit",
              "seconds", "scope", "diffusion", "completion", "prompt_digest"}  # fmt: skip
    assert not others & {field.name for field in dataclasses.fields(kind)}


def test_every_quarter_of_scope_and_diffusion_has_a_task():
    quarters = {(kind.scope, kind.diffusion) for kind in catalog.KINDS}
    assert quarters == {("low", "low"), ("low", "high"), ("high", "low"), ("high", "high")}


@pytest.mark.parametrize(
    "text",
    [
        "niah_multikey:keys=6,questions=6,depth=0.5",
        "niah_multivalue:values=2,questions=6",
        "babilong:facts=1,questions=6",
    ],
)
def test_several_questions_of_a_text_share_it_to_the_last_line(text, book):
    (task,) = catalog.parse(f"{text},text={book}")
    items = items_of(task, count=15)
    assert len({item.prompt for item in items}) == 15
    for first in range(0, 15, 6):
        texts = {item.prompt.rsplit("\n", 1)[0] for item in items[first : first + 6]}
        assert len(texts) == 1
    for item in items:
        assert LENGTH - SENTENCE - 40 < item.tokens == len(item.prompt) <= LENGTH
        assert task.score(task.parse(solver_of(task.name, book)(item.prompt)), item) == 1
    # The interval is that of texts if all questions of a text have one outcome.
    interval = task.aggregate([1] * 12 + [0] * 12)
    assert interval.high - interval.low > 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("niah_multikey:keys=3,questions=4", "4 questions of 3 keys"),
        ("babilong:facts=2,questions=2", "which answers 1; give at most questions=1"),
        ("babilong:facts=1,questions=7", "which answers 6"),
    ],
)
def test_more_questions_than_a_text_answers_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        catalog.parse(text)


# --- Chance ---------------------------------------------------------------------------------------


def share_of_guesses(task, guess, count=150, length=1500):
    """The mean score of what `guess` draws for each instance."""
    drawn = random.Random(0)
    items = items_of(task, length, count)
    return np.mean([task.score(task.parse(guess(drawn, item)), item) for item in items]), items


def test_a_drawn_order_is_right_once_in_24(book):
    rate, _ = share_of_guesses(
        ada_leval.TSort(text=book), lambda drawn, _: str(drawn.sample([1, 2, 3, 4], 4))
    )
    assert rate == pytest.approx(1 / 24, abs=0.05)


def test_a_drawn_label_is_right_once_in_as_many_candidates(book):
    rate, items = share_of_guesses(
        ada_leval.BestAnswer(text=book),
        lambda drawn, item: f"A{drawn.randint(1, item.answer[1])}", length=2500,
    )  # fmt: skip
    assert rate == pytest.approx(np.mean([1 / item.answer[1] for item in items]), abs=0.05)
    places = [item.answer[0] / item.answer[1] for item in items]
    assert np.mean(places) == pytest.approx(
        0.5 + np.mean([0.5 / i.answer[1] for i in items]), abs=0.05
    )


def test_a_drawn_value_is_right_once_in_as_many_pairs():
    def guess(drawn, item):
        return drawn.choice(suite_solvers.pairs_of(item.prompt))[1]

    rate, items = share_of_guesses(needle_threading.SingleNeedle(), guess, length=700)
    pairs = len(suite_solvers.pairs_of(items[0].prompt))
    assert rate == pytest.approx(1 / pairs, abs=0.05)


def test_a_drawn_label_is_right_once_in_as_many_labels(book):
    task = ManyShot(labels=8, text=book)
    rate, _ = share_of_guesses(
        task, lambda drawn, item: drawn.choice(re.findall(r"Label: (\w+)", item.prompt))
    )
    assert rate == pytest.approx(1 / 8, abs=0.05)


def test_a_drawn_place_is_right_once_in_six(book):
    for task in catalog.parse(f"babilong:text={book}"):
        rate, _ = share_of_guesses(task, lambda drawn, _: drawn.choice(suite_solvers.PLACES))
        assert rate == pytest.approx(1 / 6, abs=0.08)


def test_calling_every_answer_wrong_scores_what_precision_alone_allows():
    (task,) = catalog.parse("long_ins:form=gist,every=5")
    for item in items_of(task, count=20):
        shown = len(re.findall(r"^\d+\. ", item.prompt, re.M))
        everything = ", ".join(map(str, range(1, shown + 1)))
        expected = 2 * len(item.answer) / (len(item.answer) + shown)
        assert task.score(task.parse(everything), item) == pytest.approx(expected)
        assert len(item.answer) in (shown // 5, -(-shown // 5))


# --- Needle Threading -----------------------------------------------------------------------------


def test_a_haystack_is_a_json_object_of_different_keys_and_values():
    for task in catalog.parse("multi_thread"):
        (item,) = items_of(task, count=1)
        pairs = suite_solvers.pairs_of(item.prompt)
        keys, values = zip(*pairs, strict=True)
        assert len(set(keys)) == len(keys) > 60
        assert len(set(values)) == len(values)
        # Of a chain's values all but the last are keys.
        assert len(set(keys) & set(values)) == task.threads * (task.thread_length - 1)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_stands_at_its_depth(depth):
    for item in items_of(needle_threading.SingleNeedle(depth)):
        pairs = suite_solvers.pairs_of(item.prompt)
        (key,) = suite_solvers.keys_asked(item.prompt)
        index = [known for known, _ in pairs].index(key)
        assert abs(index - depth * (len(pairs) - 1)) <= 1


@pytest.mark.parametrize(("direction", "signs"), [("forward", {1}), ("backward", {-1})])
def test_a_thread_runs_through_the_text_in_its_direction(direction, signs):
    task = needle_threading.SingleThread(thread_length=8, direction=direction)
    for item in items_of(task):
        pairs = suite_solvers.pairs_of(item.prompt)
        index = {key: place for place, (key, _) in enumerate(pairs)}
        (key,) = suite_solvers.keys_asked(item.prompt)
        chain = []
        while key in index:
            chain.append(index[key])
            key = pairs[index[key]][1]
        assert len(chain) == 8
        assert {int(np.sign(b - a)) for a, b in itertools.pairwise(chain)} == signs


def test_a_branched_thread_has_dead_ends_at_every_step_but_the_last():
    task = needle_threading.BranchedThread(thread_length=4, branches=3)
    for item in items_of(task):
        keys = [key for key, _ in suite_solvers.pairs_of(item.prompt)]
        repeats = sorted(keys.count(key) for key in set(keys))
        assert repeats[-4:] == [1, 3, 3, 3]


def test_clustered_needles_stand_together():
    for item in items_of(needle_threading.MultiNeedle(5, placement="clustered")):
        keys = [key for key, _ in suite_solvers.pairs_of(item.prompt)]
        places = [keys.index(key) for key in suite_solvers.keys_asked(item.prompt)]
        assert places == list(range(places[0], places[0] + 5))


def test_half_of_the_values_of_a_list_score_a_half():
    task = needle_threading.MultiNeedle(4)
    (item,) = items_of(task, count=1)
    assert task.score(task.parse(" ".join(item.answer[:2])), item) == 0.5
    assert task.score(task.parse(" ".join(["0" * 8, *item.answer[::-1]])), item) == 1


def test_who_reads_only_the_last_third_finds_the_late_needles():
    def last_third(prompt):
        pairs = suite_solvers.pairs_of(prompt)
        late = dict(pairs[-(len(pairs) // 3) :])
        return late.get(suite_solvers.keys_asked(prompt)[0], "?")

    found = [row["score"] for row in rows_of(catalog.parse("single_needle"), last_third)]
    assert found == [0, 0, 0, 1, 1]


# --- The likeliest of the options -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["babilong", "many_shot", "tsort", "best_answer", "niah_multikey", "common_words"]
)
def test_of_options_the_likeliest_is_the_answer(name, tasks_of, book):
    solver = solver_of(name, book)
    one = {"common": 1} if name == "common_words" else {}
    tasks = [dataclasses.replace(task, answers="likeliest", **one) for task in tasks_of(name)]
    for row in rows_of(tasks, lambda prompt: f" {solver(prompt)}\n", length=4000, count=6):
        assert row["answers"] == "likeliest"
        assert row["score"] == 1
    for item in items_of(tasks[0], 4000, count=2):
        right = [option for option in item.options
                 if tasks[0].score(tasks[0].parse(option), item) == 1]  # fmt: skip
        assert len(right) == 1


def test_one_word_is_chosen_not_several():
    with pytest.raises(InputError, match="answers=likeliest chooses one word, of common=5"):
        catalog.parse("common_words:answers=likeliest,common=5")


# --- Long writing ---------------------------------------------------------------------------------


def test_long_writing_is_scored_by_the_words_written():
    def write(prompt):  # half of them
        return "w " * (int(re.search(r"of (\d+) words", prompt)[1]) // 2)

    assert [row["score"] for row in rows_of(catalog.parse("long_write"), write)] == [0.5] * 3
    assert [row["score"] for row in rows_of([LongWrite(20)], lambda _: "w " * 20)] == [1]
    assert {task.max_new_tokens for task in catalog.parse("long_write")} == {1000, 4000, 16_000}
    with pytest.raises(InputError, match=r"a prompt with 1 request takes \d+ characters"):
        items_of(LongWrite(20), 10)


# --- Answers in text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "order"),
    [
        ("[2, 4, 1, 3]", (2, 4, 1, 3)),
        ("The segments [Segment 2] ... Answer: [2, 4, 1, 3]", (2, 4, 1, 3)),
        ("2413", (2, 4, 1, 3)),
        ("2, 4, 1 and 3", (2, 4, 1, 3)),
        ("[1, 2, 2, 4]", None),
        ("[1, 2, 3, 4, 5]", (1, 2, 3, 4)),
        ("12341", None),  # two permutations
        ("", None),
    ],
)
def test_an_order_is_read_from_a_list_or_from_digits_that_spell_one(completion, order):
    assert ada_leval.parse_order(completion) == order


@pytest.mark.parametrize(
    ("completion", "label"),
    [("A12", 12), ("A1 or rather A2", 2), ("The best is A1.", 1), ("A13", None), ("3", 3),
     ("between 2 and 11", 11), ("none", None)],
)  # fmt: skip
def test_a_label_is_the_last_one_mentioned(completion, label):
    assert ada_leval.parse_label(completion, 12) == label


@pytest.mark.parametrize(
    ("task", "replies"),
    [(ada_leval.TSort, ("[2, 4, 1, 3]", "I cannot tell.", "[1, 1, 2, 3]", "3")),
     (ada_leval.BestAnswer, ("A1", "the second one", "A999", "none"))],
)  # fmt: skip
def test_ada_leval_reports_the_share_of_answers_in_the_form_asked_for(task, replies, book):
    replies = dict(zip("0123", replies, strict=True))
    asked = {}
    measured = task(text=book)

    def answer(prompt):
        return replies[asked.setdefault(prompt, str(len(asked)))]

    (row,) = rows_of([measured], answer, count=4)
    assert row["instruction_following_rate"] == 1 / 4
    chosen = dataclasses.replace(measured, answers="likeliest")
    assert chosen.rates(list(replies.values()), items_of(chosen, count=4)) == {}


# --- Filling a budget -----------------------------------------------------------------------------


def test_filling_leaves_no_room_for_one_more_and_asks_the_tokenizer_a_handful_of_times():
    asked = []

    def encode(text):
        asked.append(text)
        return text

    random = np.random.default_rng(0)
    parts = np.where(random.random(5000) < 0.2, random.integers(50, 90, 5000), 1)  # unlike ones
    lengths = np.concatenate([[17], 17 + parts.cumsum()])
    for size in (17, 18, *random.integers(19, lengths[-2], 60)):
        asked.clear()
        budget = Budget(int(size), encode, "characters")
        filled = generated.fill(budget, lambda n: "x" * int(lengths[n]), part="line")
        assert filled.tokens == lengths[filled.parts] <= size < lengths[filled.parts + 1]
        assert len(asked) <= 25


def test_filling_stops_where_there_is_no_more():
    filled = generated.fill(Budget.characters(100), lambda n: "x" * n, part="line", max_parts=7)
    assert (filled.parts, filled.tokens) == (7, 7)


def test_a_text_that_is_too_short_is_refused(book):
    for name in ("tsort", "best_answer"):
        (task,) = catalog.parse(f"{name}:text={book}")
        with pytest.raises(InputError, match=r"does not fill a prompt of 900000 characters; ask"):
            items_of(task, 900_000, count=1)


# --- Names ----------------------------------------------------------------------------------------


def test_a_task_is_measured_at_its_levels_unless_the_field_is_given():
    assert [task.depth for task in catalog.parse("single_needle")] == [0, 0.25, 0.5, 0.75, 1]
    assert [task.depth for task in catalog.parse("key_value")] == [0, 0.25, 0.5, 0.75, 1]
    assert catalog.parse("single_needle:depth=0.1") == [needle_threading.SingleNeedle(0.1)]
    assert [task.facts for task in catalog.parse("babilong:text=x")] == [1, 2, 3]
    assert {task.name for task in catalog.parse("ruler")} == {
        kind.name for kind in catalog.SUITES["ruler"]
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("single_nedle", "there is no task 'single_nedle'; did you mean 'single_needle'"),
        ("copy_gain", "in nats, .*; `lminf run long_context_retrieval` measures it"),
        ("ruler:depth=1", "gives fields to a suite; give them to one of its tasks: niah_multikey"),
        ("single_needle:depht=0.5,depth=1", "single_needle has no field 'depht'"),
        ("single_needle:depth=2", r"SingleNeedle\.depth is 2"),
        ("common_words:times=3,other_times=3", "give other_times below times"),
        ("babilong:facts=4", "babilong.facts takes 1 | 2 | 3"),
    ],
)
def test_a_task_that_is_not_there_is_refused_in_a_sentence(text, message):
    with pytest.raises(InputError, match=message):
        catalog.parse(text)


def test_a_task_that_lacks_something_is_refused_in_a_sentence():
    class Half(generated.GeneratedTask):
        name = "half"
        scope, diffusion = "low", "low"

        def parse(self, completion):
            return completion

    class Read(published.PublishedTask):
        name, max_new_tokens = "read", 5

    with pytest.raises(InputError, match=r"Half of tests\.evals\.test_suites has no method "
                       r"'make_instance' and no attribute 'max_new_tokens'; give them to "
                       r"its class$"):  # fmt: skip
        Half()
    with pytest.raises(InputError, match="has no method 'parse' and no method 'questions'; give"):
        Read("file.json")


# --- The text of the machine ----------------------------------------------------------------------


def test_prose_is_the_paragraphs_of_a_file_without_lists_headings_and_code(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"Paragraph {n} is long enough to be one of the prose {'x' * 40}." for n in range(9)]
    others = ["A heading", "  code(x)", "* A list of things", lines[0], f"{'A long line ' * 9}:"]
    path.write_text("\n\n".join([*others[:3], *lines, *others[3:]]))
    assert prose.paragraphs(str(path)) == tuple(lines)
    assert prose.indices_with_next(str(path)) == tuple(range(8))
    path.with_name("short.txt").write_text("\n\n".join(lines[:3]))
    with pytest.raises(
        InputError, match=r"short\.txt has 3 paragraphs of prose, which .* at least 8"
    ):
        prose.paragraphs(str(path.with_name("short.txt")))


@pytest.mark.slow
def test_the_documentation_of_python_fills_long_prompts():
    for name in ("tsort", "best_answer", "document_qa", "common_words"):
        (item,) = catalog.parse(name)[-1].instances(Budget.characters(150_000), count=1, key=(0,))
        assert 149_000 < item.tokens <= 150_000
