"""Impossible languages: sentences whose words are moved by rules that no human language has.

A language is a pure function from a tagged sentence and a key to tokens, where each word,
punctuation mark and clitic is a token. Source: Kallini et al. 2024, "Mission: Impossible Language
Models", arXiv:2401.06416.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.data import permutation
from lminf.data.worlds.world import Question, Words, World
from lminf.errors import InputError, refusing
from lminf.ranges import Range

REVERSED, SINGULAR, PLURAL = MARKERS = ("<rev>", "<sg>", "<pl>")
CLITICS = {"n't", "'ll", "'s", "'re", "'ve", "'m"}
PRESENT = {"VBZ": SINGULAR, "VBP": PLURAL}  # tag of a present verb -> its marker
SHORTEST, LONGEST = 2, 350  # words of a sentence that is kept
Seed: TypeAlias = Annotated[int, Range(min=0, max=2**31 - 1)]
Key: TypeAlias = tuple[int, ...]  # (seed, number of the sentence)


class Word(NamedTuple):
    text: str
    tag: str  # of the Penn Treebank
    lemma: str


Sentence: TypeAlias = tuple[Word, ...]


class Language(Protocol):
    family: ClassVar[str]

    def __call__(self, sentence: Sentence, key: Key) -> Words | None:
        """The sentence in this language; None where its family leaves the sentence out."""
        ...


# --- Shuffle and reverse --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shuffle:
    """Words in the order that a permutation of their places gives."""

    family: ClassVar[str] = "shuffle"

    def __post_init__(self):
        ranges.check(self)

    def __call__(self, sentence: Sentence, key: Key) -> Words | None:
        if not SHORTEST <= len(sentence) <= LONGEST:
            return None
        return tuple(sentence[place].text for place in self.order(len(sentence), key))

    def order(self, length: int, key: Key) -> Int[np.ndarray, " length"]:
        """Where the word at each place comes from: as it stands."""
        return np.arange(length)


class Control(_Shuffle):
    """The sentence itself."""


class Nondeterministic(_Shuffle):
    """A permutation for each sentence."""

    def order(self, length: int, key: Key) -> Int[np.ndarray, " length"]:
        return _permutation(length, key)


@dataclass(frozen=True)
class Deterministic(_Shuffle):
    """One permutation for all sentences of a length."""

    seed: Seed = 21

    def order(self, length: int, key: Key) -> Int[np.ndarray, " length"]:
        return _permutation(length, (self.seed,))


@dataclass(frozen=True)
class Local(_Shuffle):
    """One permutation within each `window` words; the last, shorter window has another."""

    window: Annotated[int, Range(min=1, max=LONGEST)]
    seed: Seed = 0

    def order(self, length: int, key: Key) -> Int[np.ndarray, " length"]:
        starts = range(0, length, self.window)
        sizes = [min(self.window, length - start) for start in starts]
        parts = [
            start + _permutation(size, (self.seed,))
            for start, size in zip(starts, sizes, strict=True)
        ]
        return np.concatenate(parts)


class EvenOdd(_Shuffle):
    """Words at even places, then those at odd places."""

    def order(self, length: int, key: Key) -> Int[np.ndarray, " length"]:
        return np.concatenate([np.arange(0, length, 2), np.arange(1, length, 2)])


def _permutation(length: int, key: Key) -> Int[np.ndarray, " length"]:
    return np.argsort(permutation.words((*key, length), length))


@dataclass(frozen=True)
class Marked:
    """A marker at a random place."""

    family: ClassVar[str] = "reverse"

    def __call__(self, sentence: Sentence, key: Key) -> Words | None:
        if not SHORTEST <= len(sentence) <= LONGEST:
            return None
        words = tuple(word.text for word in sentence)
        place = int(permutation.words((*key, 0), 1)[0] % (len(words) + 1))
        return self.turned((*words[:place], REVERSED, *words[place:]), place)

    def turned(self, marked: Words, place: int) -> Words:
        """The marked sentence as the language has it: as it stands."""
        return marked


class PartialReverse(Marked):
    """What stands after the marker is reversed."""

    def turned(self, marked: Words, place: int) -> Words:
        return marked[: place + 1] + marked[place + 1 :][::-1]


class FullReverse(Marked):
    """The marked sentence is reversed."""

    def turned(self, marked: Words, place: int) -> Words:
        return marked[::-1]


# --- Hop ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoHop:
    """Present verbs are lemmas, with a marker of their number `distance` words after them.

    Sentences are kept where the marker of every verb would fit under each language of the family:
    all of them have the same sentences.
    """

    family: ClassVar[str] = "hop"
    distance: ClassVar[int] = 0

    def __call__(self, sentence: Sentence, key: Key) -> Words | None:
        farthest = [_after(sentence, verb, WordHop.distance, words_only=True)
                    for verb in _verbs(sentence)]  # fmt: skip
        if None in farthest or not SHORTEST <= len(sentence) <= LONGEST:
            return None
        markers: dict[int, str] = {}
        for verb in _verbs(sentence):
            place = self.place(sentence, verb)
            assert place is not None
            markers[place] = markers.get(place, "") + f" {PRESENT[sentence[verb].tag]}"
        return tuple(
            token
            for i, word in enumerate(sentence)
            for token in (word.lemma if word.tag in PRESENT else word.text,
                          *markers.get(i, "").split())
        )  # fmt: skip

    def place(self, sentence: Sentence, verb: int) -> int | None:
        """The word that the verb's marker follows."""
        return verb


class TokenHop(NoHop):
    """The marker stands four tokens after its verb."""

    distance: ClassVar[int] = 4

    def place(self, sentence: Sentence, verb: int) -> int | None:
        return _after(sentence, verb, self.distance, words_only=False)


class WordHop(NoHop):
    """The marker stands four words after its verb; punctuation and clitics do not count."""

    distance: ClassVar[int] = 4

    def place(self, sentence: Sentence, verb: int) -> int | None:
        return _after(sentence, verb, self.distance, words_only=True)


def _verbs(sentence: Sentence) -> list[int]:
    return [i for i, word in enumerate(sentence) if word.tag in PRESENT]


def _after(sentence: Sentence, verb: int, count: int, *, words_only: bool) -> int | None:
    """The place `count` tokens, or words, after the verb; None where the sentence ends before."""
    counted = [
        i for i in range(verb + 1, len(sentence))
        if not words_only or (sentence[i].text not in CLITICS and sentence[i].text[0].isalnum())
    ]  # fmt: skip
    return counted[count - 1] if len(counted) >= count else None


LANGUAGES = {
    "control": Control, "nondeterministic": Nondeterministic, "deterministic": Deterministic,
    "local": Local, "even_odd": EvenOdd, "marked": Marked, "partial_reverse": PartialReverse,
    "full_reverse": FullReverse, "no_hop": NoHop, "token_hop": TokenHop, "word_hop": WordHop,
}  # fmt: skip


# --- Sentences ------------------------------------------------------------------------------------

_LEXICON = {
    "noun": "farmer baker teacher sailor doctor painter child dog cat horse bird fox river garden "
    "bridge tower market kitchen window letter basket lantern boat wagon song story stone tree",
    "verb": "walk look wait point call turn reach listen return wander answer work knock sing "
    "sleep stand",
    "adjective": "old small quiet bright heavy broken green narrow cold famous gentle empty",
    "adverb": "slowly often never always gladly loudly",
    "preposition": "near behind above under beside towards around with",
    "conjunction": "and but while",
    "singular": "the a this",
    "plural": "the these some",
}
_PLURALS = {"child": "children", "fox": "foxes", "story": "stories"}
_PRESENT = {"reach": "reaches"}


def sentences(count: int, *, seed: int) -> list[Sentence]:
    """Sentences of a small grammar, tagged: one or two clauses of 8 to 17 words each."""
    return [tuple(_sentence(_Draws((seed, number)))) for number in range(count)]


class _Draws:
    """Random choices, one after another."""

    def __init__(self, key: Key):
        self._words = iter(permutation.words(key, 64).tolist())

    def one(self, kind: str) -> str:
        words = _LEXICON[kind].split()
        return words[next(self._words) % len(words)]

    def happens(self, share: float) -> bool:
        return next(self._words) < share * 2**64


class NumberPair(NamedTuple):
    """What stands before the first marker in two sentences that differ in the number of their first
    subject alone; the words of both have the same places.
    """

    singular: Words
    plural: Words
    verb: int  # the place of the verb whose marker comes next; its subject stands before it


def number_pairs(language: NoHop, numbers: Iterable[int], *, seed: int) -> list[NumberPair]:
    """Pairs of the grammar's sentences with these numbers, which say the same of one and of many;
    those of sentences that the language leaves out are missing.
    """
    pairs = []
    for number in numbers:
        one, many = (
            tuple(_sentence(_Draws((seed, number)), plural=plural)) for plural in (False, True)
        )
        tokens = [language(sentence, (seed, number)) for sentence in (one, many)]
        if None not in tokens:
            prefixes = [
                tuple(itertools.takewhile(lambda token: token not in MARKERS, each or ()))
                for each in tokens
            ]
            pairs.append(NumberPair(*prefixes, verb=_verbs(one)[0]))
    return pairs


def _sentence(draws: _Draws, *, plural: bool | None = None) -> Iterator[Word]:
    """A sentence whose first subject has the number that is drawn, or this one."""
    yield from _clause(draws, plural=plural)
    if draws.happens(0.4):
        yield Word(",", ",", ",")
        conjunction = draws.one("conjunction")
        yield Word(conjunction, "CC", conjunction)
        yield from _clause(draws)
    yield Word(".", ".", ".")


def _clause(draws: _Draws, *, plural: bool | None = None) -> Iterator[Word]:
    drawn = draws.happens(0.5)
    plural = drawn if plural is None else plural
    yield from _noun_phrase(draws, plural)
    verb = draws.one("verb")
    if draws.happens(0.2):
        yield Word("do", "VBP", "do") if plural else Word("does", "VBZ", "do")
        yield Word("n't", "RB", "n't")
        yield Word(verb, "VB", verb)
    elif plural:
        yield Word(verb, "VBP", verb)
    else:
        yield Word(_PRESENT.get(verb, f"{verb}s"), "VBZ", verb)
    if draws.happens(0.4):
        adverb = draws.one("adverb")
        yield Word(adverb, "RB", adverb)
    for _ in range(2 if draws.happens(0.5) else 1):
        preposition = draws.one("preposition")
        yield Word(preposition, "IN", preposition)
        yield from _noun_phrase(draws, draws.happens(0.5))


def _noun_phrase(draws: _Draws, plural: bool) -> Iterator[Word]:
    if draws.happens(0.2):
        owner = draws.one("noun")
        yield from (Word("the", "DT", "the"), Word(owner, "NN", owner), Word("'s", "POS", "'s"))
    else:
        determiner = draws.one("plural" if plural else "singular")
        yield Word(determiner, "DT", determiner)
    if draws.happens(0.5):
        adjective = draws.one("adjective")
        yield Word(adjective, "JJ", adjective)
    noun = draws.one("noun")
    yield Word(_PLURALS.get(noun, f"{noun}s"), "NNS", noun) if plural else Word(noun, "NN", noun)


def read_tagged(path: Path) -> list[Sentence]:
    """The sentences of a text that is tagged: a sentence a line, each word as text/tag/lemma."""
    with refusing(str(path), kind="tagged text", advice="write it as UTF-8"):
        lines = path.read_text(encoding="utf-8").splitlines()
    tagged = []
    for number, line in enumerate(lines, 1):
        parts = [word.rsplit("/", 2) for word in line.split()]
        if any(len(part) != 3 or not all(part) for part in parts):
            raise InputError(f"{path} line {number} has a word that is not text/tag/lemma; tag the "
                             f"text, as in walks/VBZ/walk")  # fmt: skip
        tagged.append(tuple(Word(*part) for part in parts))
    if not any(tagged):
        raise InputError(f"{path} has no sentence; write one a line, as in the/DT/the dog/NN/dog")
    return tagged


def world(tagged: Sequence[Sentence], language: Language, *, held_out: int, seed: int = 0) -> World:
    """The sentences in a language; the last `held_out` of those that it keeps are its test split.

    In the hop languages every marker of a test sentence is a question: its prompt is what stands
    before the marker.
    """
    made = [
        (tokens, " ".join(word.text for word in sentence))
        for number, sentence in enumerate(tagged)
        if (tokens := language(sentence, (seed, number))) is not None
    ]
    if not 0 < held_out < len(made):
        raise InputError(
            f"{held_out:,} sentences cannot be held out: the language keeps {len(made):,} of "
            f"{len(tagged):,}, and training needs some too; give more sentences, or hold out fewer"
        )
    first = len(made) - held_out
    questions = [
        Question(tokens[:place], (token,), subject, "number")
        for subject, (tokens, _) in enumerate(made[first:], first)
        for place, token in enumerate(tokens) if token in (SINGULAR, PLURAL)
    ]  # fmt: skip
    words = {text for sentence in tagged for word in sentence for text in (word.text, word.lemma)}
    return World(
        vocabulary=tuple(sorted(words | set(MARKERS))),
        corpus={"train": [t for t, _ in made[:first]], "test": [t for t, _ in made[first:]]},
        questions={"test": questions},
        truth=[{"sentence": sentence} for _, sentence in made],
    )
