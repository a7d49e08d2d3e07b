"""bioS: people with names of their own, and texts that say what is true of them and no more."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from lminf import checkpoints, cli
from lminf.data import store
from lminf.data.worlds import bios
from lminf.data.worlds.bios import ATTRIBUTES, TEMPLATES, Augmentation, Bios, Sizes
from lminf.errors import InputError
from tests import stated_ranges

FEW = Sizes(first=5, middle=4, last=30, years=10, cities=8, universities=6, majors=5, employers=9)
ALL = Augmentation(5, permute=True, fullname=True)
PEOPLE = Bios(60, 3, ALL, FEW)


def said(own, person):
    """The person's six values, as text."""
    return [" ".join(own.value(person, name)) for name in ATTRIBUTES]


def test_a_world_follows_from_its_seed():
    world = PEOPLE.world()
    assert world == Bios(60, 3, ALL, FEW).world()
    assert world.truth != Bios(60, 4, ALL, FEW).world().truth
    assert world.vocabulary == Bios(10, 4, Augmentation(), FEW).world().vocabulary


def test_full_names_are_unique_and_made_of_few_parts():
    assert len({PEOPLE.name(person) for person in range(60)}) == 60
    everybody = Bios(600, 0, sizes=FEW)  # every name that there is
    names = [everybody.name(person) for person in range(600)]
    assert len(set(names)) == 600
    assert [len(set(part)) for part in zip(*names, strict=True)] == [5, 4, 30]
    paper = Bios(100_000)
    assert len({paper.name(person) for person in range(0, 100_000, 20)}) == 5000


def test_the_employers_city_is_a_function_of_the_employer():
    cities = collections.defaultdict(set)
    for person in range(60):
        cities[PEOPLE.value(person, "employer")].add(PEOPLE.value(person, "employer_city"))
    assert len(cities) > 5
    assert all(len(found) == 1 for found in cities.values())
    assert len(set().union(*cities.values())) > 1


def test_values_are_spread_over_their_numbers():
    many = Bios(4000, 0)
    counts = {"birth_month": 12, "birth_city": 200, "university": 300, "major": 100,
              "employer": 263}  # fmt: skip
    for name, count in counts.items():
        seen = np.bincount(many.labels[name], minlength=count)
        assert len(seen) == count
        # Chi-squared over its degrees of freedom: 1, give or take five standard deviations.
        spread = ((seen - 4000 / count) ** 2 / (4000 / count)).sum() / (count - 1)
        assert abs(spread - 1) < 5 * (2 / (count - 1)) ** 0.5
    days = {many.value(person, "birth_date")[1] for person in range(4000)}
    years = {many.value(person, "birth_date")[2] for person in range(4000)}
    assert (len(days), len(years)) == (28, 200)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_template_mentions_who_and_what_once(attribute):
    assert 46 <= len(set(TEMPLATES[attribute])) == len(TEMPLATES[attribute]) <= 52
    for template in TEMPLATES[attribute]:
        assert template.count("{who}") == template.count("{value}") == 1
        assert template.index("{who}") < template.index("{value}")


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation(3), Augmentation(3, permute=True), ALL],
    ids=lambda own: f"{own.multi}{own.permute}{own.fullname}",
)
def test_a_biography_is_six_sentences_about_the_person(augmentation):
    own = Bios(40, 1, augmentation, FEW)
    orders, texts = set(), set()
    for person, row in enumerate(own.world().truth):
        name, pronoun = row["name"], row["pronoun"]
        for number in range(augmentation.multi):
            words, values = own.biography(person, number)
            sentences = " ".join(words).split(" .")[:-1]
            assert len(sentences) == 6
            named = [name in sentence for sentence in sentences]
            by_pronoun = [sentence.split().count(pronoun) for sentence in sentences]
            assert named == [True] + [augmentation.fullname] * 5
            assert by_pronoun == [0] + [int(not augmentation.fullname)] * 5
            assert [" ".join(words[slice(*values[a])]) for a in ATTRIBUTES] == said(own, person)
            order = tuple(sorted(ATTRIBUTES, key=lambda attribute: values[attribute]))
            for sentence, attribute in zip(sentences, order, strict=True):
                assert f" {' '.join(own.value(person, attribute))}" in sentence
            orders.add(order)
            texts.add(words)
    assert len(texts) == 40 * augmentation.multi  # templates of their own
    assert (orders == {ATTRIBUTES}) == (not augmentation.permute)
    assert augmentation.permute == (len(orders) > 30)


def test_multi1_without_options_is_single():
    single, multi1 = (
        Bios(30, 2, bios.parse_augmentation(text), FEW) for text in ("single", "multi1")
    )
    assert single.world() == multi1.world()
    five = Bios(30, 2, bios.parse_augmentation("multi5"), FEW).world()
    assert len(five.corpus["train"]) == 5 * len(single.world().corpus["train"]) == 150
    assert set(single.world().corpus["train"]) < set(five.corpus["train"])


def test_questions_are_split_by_person_and_answered_by_the_truth():
    world = PEOPLE.world()
    subjects = {split: {q.subject for q in asked} for split, asked in world.questions.items()}
    assert subjects == {"train": set(range(30)), "test": set(range(30, 60))}
    for asked in world.questions.values():
        assert len({question.prompt for question in asked}) == len(asked) == 180
        for question in asked:
            row = world.truth[question.subject]
            assert row["name"] in " ".join(question.prompt)
            assert row[question.attribute] == " ".join(question.answer)


def test_no_answer_of_a_test_person_is_in_what_questions_train_on():
    """A test person's name is in biographies alone, and a prompt holds no value."""
    world = PEOPLE.world()
    asked = [" ".join(q.prompt + q.answer) for q in world.questions["train"]]
    values = {word for person in range(60) for name in ATTRIBUTES
              for word in PEOPLE.value(person, name)}  # fmt: skip
    for question in world.questions["test"]:
        name = world.truth[question.subject]["name"]
        assert not any(name in text for text in asked)
        assert not values & set(question.prompt)


def test_biographies_are_in_a_random_order():
    """No two of a person stand together more often than chance: 5 of 300 texts are a person's, so
    a neighbour is of the same person with probability 4 / 299.
    """
    neighbours = 0
    for seed in range(6):
        own = Bios(60, seed, ALL, FEW)
        who = {own.biography(person, number).words: person
               for person in range(60) for number in range(5)}  # fmt: skip
        order = np.array([who[words] for words in own.world().corpus["train"]])
        assert sorted(order) == sorted([*range(60)] * 5)
        neighbours += int((order[1:] == order[:-1]).sum())
    expected = 6 * 299 * 4 / 299
    assert abs(neighbours - expected) < 4 * expected**0.5


def test_the_command_writes_token_stores_of_the_world(tmp_path, capsys):
    out = tmp_path / "world"
    arguments = ["world", "bios", "--people=20", "--augment=multi2+permute", "--seed=7"]
    cli.main([*arguments, f"--out={out}"])
    assert f"{out / 'train'}: " in capsys.readouterr().out
    world = Bios(20, 7, Augmentation(2, permute=True)).world()
    tokenizer = checkpoints.read_tokenizer(out)
    assert tokenizer.digest == world.tokenizer.digest
    for name, count in (("train", 40), ("questions_train", 60), ("questions_test", 60)):
        written = store.open_store(str(out / name), tokenizer_digest=tokenizer.digest)
        ends = written.ends.tolist()
        assert len(ends) == count
        tokens = written.read([0], [written.tokens])[0]
        expected = world.documents(name)
        np.testing.assert_array_equal(tokens, np.concatenate(expected))
        np.testing.assert_array_equal(ends, np.cumsum([len(document) for document in expected]))
    truth = [json.loads(line) for line in (out / "truth.jsonl").read_text().splitlines()]
    assert truth == world.truth
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in asked] == [
        list(q.answer) for questions in world.questions.values() for q in questions
    ]
    with pytest.raises(InputError, match="is there and not empty; name a new folder with --out"):
        cli.main([*arguments, f"--out={out}", "--debug"])


def test_a_world_that_asks_nothing_has_no_store_of_questions(tmp_path):
    out = tmp_path / "world"
    cli.main(["world", "impossible", "--sentences=30", "--held-out=10", f"--out={out}"])
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["test", "train"]
    assert store.open_store(str(out / "test")).ends.size == 10
    (tmp_path / "file").write_text("")
    below = tmp_path / "file/below"
    for place, message in ((below, "cannot write"), ("gs://bucket/x", "into a folder")):
        with pytest.raises(InputError, match=message):
            cli.main(["world", "bios", "--people=4", f"--out={place}", "--debug"])


@pytest.mark.parametrize("sample", [FEW, ALL, PEOPLE], ids=lambda own: type(own).__name__)
def test_numbers_outside_their_range_are_refused_by_field(sample):
    assert stated_ranges.without_range(type(sample)) == []
    for field, value in stated_ranges.outside(type(sample)):
        with pytest.raises(InputError, match=rf"^{type(sample).__name__}\.{field} is .*; give "):
            dataclasses.replace(sample, **{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bios", "--people=160000001"], "160,000,001 people need as many full names, and 400 fir"),
        (["bios", "--people=1"], "Bios.people is 1; give a whole number of at least 2"),
        (["bios", "--augment=multi5+shuffle"], "there is no augmentation 'multi5.shuffle'; give s"),
        (["bios", "--augment=permute+permute"], "there is no augmentation 'permute.permute'"),
        (["bios", "--augment=multi5+multi3"], "there is no augmentation 'multi5.multi3'"),
        (["bios", "--language=local"], "--language is not of the world bios; leave it out"),
        (["bios", "--seed=-1"], "--seed=-1: give a whole number of at least 0"),
        (["impossible", "--seed=-1"], "--seed=-1: give a whole number of at least 0"),
        (["biographies"], "there is no world 'biographies'; use bios, impossible"),
        (["impossible", "--language=locl"], "no language is called 'locl'; did you mean"),
        (
            ["impossible", "--sentences=5"],
            "1,000 sentences cannot be held out: the language keeps 5 of 5",
        ),
        (["impossible", "--tagged=no.txt"], "no.txt could not be read"),
        (["impossible", "--tagged=no.txt", "--sentences=9"], "--sentences counts those of the gra"),
    ],
)
def test_what_makes_no_world_is_one_sentence(arguments, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        cli.main(["world", *arguments, f"--out={out}", "--debug"])
    assert not out.exists()
