"""Impossible languages: what each rule does to a sentence, and that its inverse undoes it."""

import collections

import numpy as np
import pytest

from lminf import cli
from lminf.data.worlds import impossible
from lminf.data.worlds.impossible import (
    CLITICS,
    LANGUAGES,
    MARKERS,
    PLURAL,
    REVERSED,
    SINGULAR,
    Deterministic,
    EvenOdd,
    Local,
    Word,
)  # fmt: skip
from lminf.errors import InputError
from tests import stated_ranges

SENTENCES = impossible.sentences(300, seed=1)


def texts(sentence):
    return tuple(word.text for word in sentence)


def spoken(language, sentences=SENTENCES):
    return [language(sentence, (0, i)) for i, sentence in enumerate(sentences)]


def words_of(text):
    return tuple(Word(*word.split("/")) for word in text.split())


def test_a_tagged_text_without_a_sentence_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.txt has no sentence; write one a line"):
        impossible.read_tagged(tmp_path / "empty.txt")


@pytest.mark.parametrize("option", ["--held-out=-1", "--sentences=0"])
def test_a_number_out_of_range_is_refused_by_the_name_of_its_option(option, tmp_path):
    args = cli.parse(["world", "impossible", option, f"--out={tmp_path / 'new'}"])
    with pytest.raises(InputError, match=f"^{option}: give a whole number of at least 1"):
        args.command(args)
    assert not (tmp_path / "new").exists()


# --- The grammar ----------------------------------------------------------------------------------


def test_sentences_are_tagged_and_agree():
    assert SENTENCES == impossible.sentences(300, seed=1) != impossible.sentences(300, seed=2)
    assert impossible.sentences(3, seed=1) == SENTENCES[:3]
    verbs = collections.Counter()
    for sentence in SENTENCES:
        assert sentence[-1].text == "."
        nouns = []
        for i, word in enumerate(sentence):
            owner = i + 1 < len(sentence) and sentence[i + 1].tag == "POS"
            nouns += [] if owner or not word.tag.startswith("NN") else [word.tag]
            if word.tag in ("VBZ", "VBP"):
                verbs[word.tag] += 1
                assert (nouns[-1] == "NN") == (word.tag == "VBZ")
                assert (word.text != word.lemma) == (word.tag == "VBZ")
                nouns = []
    assert min(verbs.values()) > 100


@pytest.mark.parametrize("name", ["no_hop", "token_hop", "word_hop"])
def test_a_number_pair_differs_in_its_subject_and_determiner(name):
    language = LANGUAGES[name]()
    pairs = impossible.number_pairs(language, range(300), seed=1)
    assert len(pairs) == sum(sentence is not None for sentence in spoken(language))
    given = {tokens[: tokens.index(marker)]: marker for tokens in spoken(language) if tokens
             for marker in (next(t for t in tokens if t in MARKERS),)}  # fmt: skip
    nouns = {word.text: word.tag for sentence in SENTENCES for word in sentence}
    for one, many, verb in pairs:
        assert (one in given) + (many in given) >= 1  # each is made of a sentence of the language
        assert given.get(one, SINGULAR) == SINGULAR
        assert given.get(many, PLURAL) == PLURAL
        assert len(one) == len(many)
        different = [i for i in range(len(one)) if one[i] != many[i]]
        assert different[-1] == verb - 1
        assert nouns[one[verb - 1]] == "NN"
        assert len(different) <= 2  # a determiner: a, this; these, some
        after = [word for word in one[verb + 1 :] if name == "token_hop"
                 or (word not in CLITICS and word.isalnum())]  # fmt: skip
        assert len(after) == language.distance


# --- Shuffle --------------------------------------------------------------------------------------


def test_the_control_says_the_sentence_itself():
    assert spoken(LANGUAGES["control"]()) == [texts(sentence) for sentence in SENTENCES]


def test_a_deterministic_shuffle_has_one_permutation_for_a_length():
    order = {}
    for sentence, tokens in zip(SENTENCES, spoken(Deterministic(21)), strict=True):
        # By place: a sentence whose words are all different says where each went.
        numbered = tuple(Word(str(i), "NN", str(i)) for i in range(len(sentence)))
        moved = Deterministic(21)(numbered, (5, 5))
        assert moved == order.setdefault(len(sentence), moved)
        inverse = np.argsort([int(token) for token in moved])
        assert tuple(tokens[i] for i in inverse) == texts(sentence)
    assert any(moved != tuple(sorted(moved, key=int)) for moved in order.values())
    assert spoken(Deterministic(21)) != spoken(Deterministic(57))


@pytest.mark.parametrize("window", [3, 5, 10])
def test_a_local_shuffle_stays_within_its_windows_and_is_undone(window):
    for sentence, tokens in zip(SENTENCES, spoken(Local(window)), strict=True):
        numbered = tuple(Word(str(i), "NN", str(i)) for i in range(len(sentence)))
        places = [int(token) for token in Local(window)(numbered, (0, 0))]
        assert all(place // window == i // window for i, place in enumerate(places))
        full = np.array(places[: len(places) // window * window]).reshape(-1, window)
        within = full - full.min(1, keepdims=True) if len(full) else full
        assert (within == within[:1]).all()  # every full window has the same permutation
        undone = [""] * len(tokens)
        for token, place in zip(tokens, places, strict=True):
            undone[place] = token
        assert tuple(undone) == texts(sentence)


def test_even_places_stand_before_odd_ones():
    for sentence, tokens in zip(SENTENCES, spoken(EvenOdd()), strict=True):
        half = (len(tokens) + 1) // 2
        undone = [tokens[i // 2] if i % 2 == 0 else tokens[half + i // 2]
                  for i in range(len(tokens))]  # fmt: skip
        assert tuple(undone) == texts(sentence)


def test_a_nondeterministic_shuffle_keeps_the_words_alone():
    same = [SENTENCES[0]] * 50
    made = spoken(LANGUAGES["nondeterministic"](), same)
    assert {tuple(sorted(tokens)) for tokens in made} == {tuple(sorted(texts(SENTENCES[0])))}
    assert len(set(made)) > 45
    assert made == spoken(LANGUAGES["nondeterministic"](), same)  # the key fixes each


def test_sentences_outside_2_to_350_words_are_left_out():
    for count, kept in ((1, False), (2, True), (350, True), (351, False)):
        sentence = (Word("a", "DT", "a"),) * count
        assert all((LANGUAGES[name]()(sentence, (0, 0)) is not None) == kept
                   for name in ("control", "even_odd", "marked", "full_reverse"))  # fmt: skip


# --- Reverse --------------------------------------------------------------------------------------


def test_reversals_are_undone_from_the_marker():
    marked, partial, full = (spoken(LANGUAGES[name]())
                             for name in ("marked", "partial_reverse", "full_reverse"))  # fmt: skip
    shares = []
    for sentence, control, half, whole in zip(SENTENCES, marked, partial, full, strict=True):
        place = control.index(REVERSED)
        shares.append(place / len(sentence))
        assert control[:place] + control[place + 1 :] == texts(sentence)
        assert half[: place + 1] == control[: place + 1]
        assert tuple(reversed(half[place + 1 :])) == control[place + 1 :]
        assert tuple(reversed(whole)) == control
    # Uniform over the places: four standard deviations of a mean of 300.
    assert abs(np.mean(shares) - 0.5) < 4 * (1 / 12 / len(shares)) ** 0.5
    assert {0.0, 1.0} < set(shares)


# --- Hop ------------------------------------------------------------------------------------------

DOGS = words_of(
    "the/DT/the dogs/NNS/dog do/VBP/do n't/RB/n't walk/VB/walk ,/,/, they/PRP/they run/VBD/run "
    "home/RB/home ././."
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_hop", "the dogs do <pl> n't walk , they run home ."),
        ("token_hop", "the dogs do n't walk , they <pl> run home ."),
        ("word_hop", "the dogs do n't walk , they run home <pl> ."),
    ],
)
def test_a_marker_hops_four_tokens_or_four_words(name, expected):
    assert LANGUAGES[name]()(DOGS, (0, 0)) == tuple(expected.split())


@pytest.mark.parametrize("name", ["no_hop", "token_hop", "word_hop"])
def test_each_verb_has_its_marker_at_the_exact_distance(name):
    distance = {"no_hop": 0, "token_hop": 4, "word_hop": 4}[name]
    kept = 0
    for sentence, tokens in zip(SENTENCES, spoken(LANGUAGES[name]()), strict=True):
        verbs = [(i, word) for i, word in enumerate(sentence) if word.tag in ("VBZ", "VBP")]
        if tokens is None:
            continue
        kept += 1
        plain = [token for token in tokens if token not in MARKERS]
        assert plain == [w.lemma if w.tag in ("VBZ", "VBP") else w.text for w in sentence]
        expected = []
        for i, verb in verbs:
            end, left = i, distance
            while left:
                end += 1
                counts = name == "token_hop" or not (plain[end] in CLITICS or plain[end] in ",.")
                left -= counts
            expected.append((end, SINGULAR if verb.tag == "VBZ" else PLURAL))
        seen, found = -1, []
        for token in tokens:
            if token in MARKERS:
                found.append((seen, token))
            else:
                seen += 1
        assert found == sorted(expected, key=lambda pair: pair[0])
    assert 200 < kept < len(SENTENCES)


def test_the_hop_languages_keep_the_same_sentences():
    kept = [[tokens is not None for tokens in spoken(LANGUAGES[name]())]
            for name in ("no_hop", "token_hop", "word_hop")]  # fmt: skip
    assert kept[0] == kept[1] == kept[2]
    short = words_of("it/PRP/it runs/VBZ/run on/IN/on and/CC/and on/IN/on ././.")
    assert LANGUAGES["token_hop"]()(short, (0, 0)) is None  # three words and a full stop behind it


# --- Worlds ---------------------------------------------------------------------------------------


def test_a_world_has_its_questions_where_the_markers_stand():
    world = impossible.world(SENTENCES, LANGUAGES["word_hop"](), held_out=40)
    assert len(world.corpus["test"]) == 40
    assert [len(world.truth)] == [len(world.corpus["train"]) + 40]
    markers = 0
    for question in world.questions["test"]:
        tokens = world.corpus["test"][question.subject - len(world.corpus["train"])]
        assert tokens[: len(question.prompt) + 1] == question.prompt + question.answer
        markers += 1
    assert markers == sum(token in MARKERS for tokens in world.corpus["test"] for token in tokens)
    other = impossible.world(SENTENCES, LANGUAGES["control"](), held_out=40)
    assert other.vocabulary == world.vocabulary  # perplexities are over the same tokens
    assert not other.questions["test"]
    ids = world.encode(world.corpus["train"][0])
    text = " ".join(world.corpus["train"][0])
    np.testing.assert_array_equal(ids, world.tokenizer.encode(text))
    assert world.tokenizer.decode(ids) == text


def test_a_tagged_text_is_read(tmp_path):
    path = tmp_path / "tagged.txt"
    lines = [" ".join("/".join(word) for word in sentence) for sentence in SENTENCES[:5]]
    path.write_text("\n".join([*lines, "1/2/CD/1/2 is/VBZ/be ././."]))
    assert impossible.read_tagged(path)[:5] == SENTENCES[:5]
    path.write_text("a/DT/a\nwalks/VBZ dog/NN/dog")
    with pytest.raises(InputError, match="line 2 has a word that is not text/tag/lemma"):
        impossible.read_tagged(path)


def test_what_makes_no_language_or_world_is_refused():
    for sample in (Deterministic(1), Local(3)):
        assert stated_ranges.without_range(type(sample)) == []
        for field, value in stated_ranges.outside(type(sample)):
            with pytest.raises(InputError, match=rf"^{type(sample).__name__}\.{field} is "):
                type(sample)(**{**vars(sample), field: value})
    for count in (0, 300):
        with pytest.raises(InputError, match=rf"{count} sentences .* keeps 300 of 300"):
            impossible.world(SENTENCES, EvenOdd(), held_out=count)
