"""bioS: biographies of invented people, with six attributes each, and questions about them.

Everybody's biographies are in the corpus; only the train people's questions may be trained on, so
that an answer about a test person must come from a biography.
Source: Allen-Zhu and Li 2023, "Physics of Language Models: Part 3.1", arXiv:2309.14316. Names,
values and sentences are our own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from lminf import ranges
from lminf.data import permutation
from lminf.data.worlds.world import Question, Words, World
from lminf.errors import InputError
from lminf.ranges import Range

_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
_COINED = len(_SYLLABLES) ** 2  # words of one kind: two syllables and the ending of the kind
_ENDINGS = {
    "first": "n", "middle": "r", "last": "sted", "city": "ford", "university": "vale",
    "major": "istics", "employer": "corp",
}  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_DAYS, _FIRST_YEAR = 28, 1850
Count: TypeAlias = Annotated[int, Range(min=1, max=_COINED)]

# A sentence is an opening, who, a statement and a value: 7 x 7 templates of each attribute.
_OPENINGS = (
    "",
    "indeed ,",
    "in fact ,",
    "on record ,",
    "officially ,",
    "as known ,",
    "by the way ,",
)
_STATEMENTS = {
    "birth_date": "was born on|came into the world on|has a birthday dating from|"
    "first saw light on|counts the years since|began life on|is registered with the birth date",
    "birth_city": "was born in|is a native of|spent the first days in|comes from|was a child of|"
    "has roots in|grew up in",
    "university": "studied at|holds a degree from|attended lectures of|graduated from|"
    "was a student of|was taught by the staff of|spent the student years at",
    "major": "took a degree in|specialised in|chose the subject of|passed the exams in|"
    "wrote a thesis on|learned all about|was trained in",
    "employer": "works for|is paid by|found a job with|has a desk at|is employed by|"
    "signed a contract with|joined the people of",
    "employer_city": "has an office in|goes to work in|earns a living in|does business in|"
    "can be found on weekdays in|moved for the job to|took up a post in",
}
_QUESTIONS = {
    "birth_date": "when was {who} born ?", "birth_city": "where was {who} born ?",
    "university": "where did {who} study ?", "major": "what did {who} study ?",
    "employer": "who employs {who} ?", "employer_city": "where does {who} work ?",
}  # fmt: skip
ATTRIBUTES = tuple(_STATEMENTS)
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    attribute: tuple(
        f"{opening} {{who}} {statement} {{value}} .".strip()
        for opening in _OPENINGS for statement in statements.split("|")
    )
    for attribute, statements in _STATEMENTS.items()
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How many names and values there are to draw from; the defaults are the paper's."""

    first: Count = 400
    middle: Count = 400
    last: Count = 1000
    years: Annotated[int, Range(min=1, max=1000)] = 200
    cities: Count = 200
    universities: Count = 300
    majors: Count = 100
    employers: Count = 263

    def __post_init__(self):
        ranges.check(self)


@dataclass(frozen=True)
class Augmentation:
    """How often, and in how many ways, a person is written about; the defaults are `single`."""

    multi: Annotated[int, Range(min=1, max=1000)] = 1  # biographies, each with templates of its own
    permute: bool = False  # sentences in a random order, instead of that of ATTRIBUTES
    fullname: bool = False  # the name in every sentence, instead of a pronoun after the first

    def __post_init__(self):
        ranges.check(self)


def parse_augmentation(text: str) -> Augmentation:
    """The augmentation that `single`, `multi5+permute+fullname` and the like name."""
    settings: dict = {}
    for part in text.split("+"):
        multi = re.fullmatch(r"multi(\d{1,4})", part)
        named = {"multi": int(multi[1])} if multi else {part: True}
        known = multi or part in ("permute", "fullname") or text == "single"
        if not known or set(named) & set(settings):
            raise InputError(f"there is no augmentation {text!r}; give single, or multi5, permute "
                             f"and fullname with + between them, each once")  # fmt: skip
        settings |= {} if text == "single" else named
    return Augmentation(**settings)


class Biography(NamedTuple):
    words: Words
    values: Mapping[str, tuple[int, int]]  # attribute -> its first word, and the one after its last


@dataclass(frozen=True)
class Bios:
    """People 0 … `people` - 1; those before `num_train` are train people."""

    people: Annotated[int, Range(min=2, max=2**31 - 1)]
    seed: Annotated[int, Range(min=0, max=2**31 - 1)] = 0
    augmentation: Augmentation = Augmentation()
    sizes: Sizes = Sizes()

    def __post_init__(self):
        ranges.check(self)
        sizes = self.sizes
        names = sizes.first * sizes.middle * sizes.last
        if self.people > names:
            raise InputError(
                f"{self.people:,} people need as many full names, and {sizes.first} first, "
                f"{sizes.middle} middle and {sizes.last} last names make {names:,}; give fewer "
                f"people, or more names"
            )

    @property
    def num_train(self) -> int:
        return self.people // 2

    def world(self) -> World:
        """Biographies of everybody in one random order, and each person's six questions."""
        numbers = np.arange(self.people * self.augmentation.multi)
        order = permutation.shuffled(numbers, len(numbers), seed=(self.seed, 0))
        biographies = [
            self.biography(*divmod(number, self.augmentation.multi)).words
            for number in order.tolist()
        ]
        people = {"train": range(self.num_train), "test": range(self.num_train, self.people)}
        return World(
            vocabulary=self._vocabulary,
            corpus={"train": biographies},
            questions={
                split: [self.question(person, attribute)
                        for person in persons for attribute in ATTRIBUTES]
                for split, persons in people.items()
            },
            truth=[
                {"name": " ".join(self.name(person)), "pronoun": self._pronoun(person),
                 **{name: " ".join(self.value(person, name)) for name in ATTRIBUTES}}
                for person in range(self.people)
            ],
        )  # fmt: skip

    def biography(self, person: int, number: int) -> Biography:
        """One of a person's biographies: six sentences, whose templates (and order) are its own."""
        drawn = permutation.words((self.seed, 1, person, number), 2 * len(ATTRIBUTES))
        order = np.arange(len(ATTRIBUTES))
        if self.augmentation.permute:
            order = np.argsort(drawn[len(ATTRIBUTES) :])
        words, values = [], {}
        for place, index in enumerate(order):
            attribute = ATTRIBUTES[index]
            template = TEMPLATES[attribute][int(drawn[index] % len(TEMPLATES[attribute]))]
            named = place == 0 or self.augmentation.fullname
            who = self.name(person) if named else (self._pronoun(person),)
            lead, tail = template.format(who=" ".join(who), value="\n").split("\n")
            value = self.value(person, attribute)
            words += lead.split()
            values[attribute] = (len(words), len(words) + len(value))
            words += [*value, *tail.split()]
        return Biography(tuple(words), values)

    def question(self, person: int, attribute: str) -> Question:
        text = _QUESTIONS[attribute].format(who=" ".join(self.name(person)))
        return Question(tuple(text.split()), self.value(person, attribute), person, attribute)

    def name(self, person: int) -> Words:
        """First, middle and last name, which nobody else has together."""
        full, sizes = int(self._names[person]), self.sizes
        full, last = divmod(full, sizes.last)
        first, middle = divmod(full, sizes.middle)
        coined = self._coined
        return coined["first"][first], coined["middle"][middle], coined["last"][last]

    def value(self, person: int, attribute: str) -> Words:
        index = int(self.labels[attribute][person])
        if attribute == "birth_date":
            month, rest = divmod(index, _DAYS * self.sizes.years)
            day, year = divmod(rest, self.sizes.years)
            return _MONTHS[month], str(day + 1), str(_FIRST_YEAR + year)
        kind = "city" if attribute.endswith("city") else attribute
        return (self._coined[kind][index],)

    @cached_property
    def labels(self) -> dict[str, Int[np.ndarray, " people"]]:
        """The number of everybody's value, by attribute; months of birth as `birth_month`."""
        sizes, dates = self.sizes, len(_MONTHS) * _DAYS * self.sizes.years
        counts = dict(zip(ATTRIBUTES, (dates, sizes.cities, sizes.universities, sizes.majors,
                                       sizes.employers), strict=False))  # fmt: skip
        labels = {
            name: self._draw(np.arange(self.people), count, stream=2 + index)
            for index, (name, count) in enumerate(counts.items())
        }
        of_employer = self._draw(np.arange(sizes.employers), sizes.cities, stream=8)
        labels["employer_city"] = of_employer[labels["employer"]]
        labels["birth_month"] = labels["birth_date"] // (_DAYS * sizes.years)
        return labels

    def _draw(self, indices: np.ndarray, count: int, *, stream: int) -> np.ndarray:
        shares = permutation.uniform(indices.astype(np.uint64), seed=(self.seed, stream))
        return (shares * count).astype(np.int64)

    def _pronoun(self, person: int) -> str:
        return ("she", "he")[int(self._genders[person])]

    @cached_property
    def _genders(self) -> np.ndarray:
        return self._draw(np.arange(self.people), 2, stream=9)

    @cached_property
    def _names(self) -> Int[np.ndarray, " people"]:
        count = self.sizes.first * self.sizes.middle * self.sizes.last
        return permutation.shuffled(np.arange(self.people), count, seed=(self.seed, 10))

    @cached_property
    def _coined(self) -> dict[str, Words]:
        """Kind -> its words; those of a larger world begin with those of a smaller one."""
        sizes = self.sizes
        counts = {
            "first": sizes.first, "middle": sizes.middle, "last": sizes.last,
            "city": sizes.cities, "university": sizes.universities, "major": sizes.majors,
            "employer": sizes.employers,
        }  # fmt: skip
        coined = {}
        for stream, (kind, count) in enumerate(counts.items()):
            numbers = permutation.shuffled(np.arange(count), _COINED, seed=stream)
            pairs = (divmod(number, len(_SYLLABLES)) for number in numbers.tolist())
            stems = (_SYLLABLES[first] + _SYLLABLES[last] for first, last in pairs)
            coined[kind] = tuple(stem.capitalize() + _ENDINGS[kind] for stem in stems)
        return coined

    @property
    def _vocabulary(self) -> Words:
        texts = (*(t for texts in TEMPLATES.values() for t in texts), *_QUESTIONS.values())
        said = {word for text in texts for word in text.split()} - {"{who}", "{value}"}
        days = {str(day + 1) for day in range(_DAYS)}
        years = {str(_FIRST_YEAR + year) for year in range(self.sizes.years)}
        names = {word for words in self._coined.values() for word in words}
        return tuple(sorted(said | {"she", "he"} | set(_MONTHS) | days | years | names))
