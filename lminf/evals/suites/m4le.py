"""M4LE's five abilities, tested by composing short notes into one long text.

    explicit_single    the note is named by its number
    semantic_single    the note is named by what it is about
    explicit_multiple  several notes, by their numbers
    semantic_multiple  all notes about something
    global             something about all notes

Source: Kwan et al. 2023, arXiv:2310.19240, which composes 36 data sets so; our short task is to
read a note of one sentence, so that a score says what the composition costs and little else.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lminf.evals.suites.generated import GeneratedTask, fill
from lminf.evals.suites.suite_task import Instance
from lminf.evals.task import Budget

CITIES = (
    "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Dakar", "Hanoi", "Minsk", "Perth", "Tunis",
    "Sofia", "Osaka", "Turin", "Leeds", "Basel", "Porto",
)  # fmt: skip
GOODS = (
    "violins", "carpets", "lamps", "bricks", "kettles", "maps", "clocks", "ropes", "sails", "tiles",
    "chairs", "drums", "tents", "books", "bells", "gloves",
)  # fmt: skip
Ability = Literal[
    "explicit_single", "semantic_single", "explicit_multiple", "semantic_multiple", "global"
]
SEVERAL = 3  # notes of a question about several
CITY = re.compile("|".join(CITIES))


@dataclass(frozen=True)
class M4LE(GeneratedTask):
    """The cities of the notes asked about, or the city that most notes name."""

    ability: Ability = "explicit_single"

    name = "m4le"
    scope, diffusion = "high", "low"
    levels = ("ability", get_args(Ability))
    max_new_tokens = 24

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        special, *usual = (str(each) for each in random.permutation(GOODS))
        shares = sorted(random.random(SEVERAL if "multiple" in self.ability else 1))
        drawn_cities = [str(city) for city in random.choice(CITIES, SEVERAL, replace=False)]
        hay: list[tuple[str, str]] = []  # goods and city

        def notes(count: int) -> list[tuple[str, str]]:
            while len(hay) < count:
                hay.append((str(random.choice(usual)), str(random.choice(CITIES))))
            composed = list(hay[:count])
            for index, city in zip(self._meant(shares, count), drawn_cities, strict=False):
                composed[index] = special, city
            if self.ability == "global":
                self._make_clear(composed, drawn_cities[0])
            return composed

        def prompt(count: int) -> str:
            lines = "\n".join(
                f"Note {number}: {40 + number % 7} {goods} were sent to {city}."
                for number, (goods, city) in enumerate(notes(count), 1)
            )
            return f"{lines}\n{self._question(special, self._meant(shares, count))}"

        filled = fill(budget, prompt, part="note", min_parts=2 * SEVERAL)
        composed = notes(filled.parts)
        if self.ability == "global":
            answer = [Counter(city for _, city in composed).most_common(1)[0][0]]
        else:
            answer = [composed[index][1] for index in self._meant(shares, filled.parts)]
        return Instance(filled.prompt, answer, filled.tokens)

    def _meant(self, shares: list[float], count: int) -> list[int]:
        """Indices of the notes that are asked for, different and rising."""
        return [int(s * (count - len(shares) + 1)) + i for i, s in enumerate(shares)]

    def _make_clear(self, composed: list[tuple[str, str]], city: str) -> None:
        """Makes the city that of every third note, and the others take turns."""
        decoys = [decoy for decoy in CITIES if decoy != city]
        for index, (goods, _) in enumerate(composed):
            composed[index] = goods, city if index % 3 == 0 else decoys[index % len(decoys)]

    def _question(self, special: str, meant: list[int]) -> str:
        numbers = ", ".join(str(index + 1) for index in meant)
        return {
            "explicit_single": f"Question: Which city does note {numbers} name?\nAnswer:",
            "semantic_single": f"Question: To which city were {special} sent?\nAnswer:",
            "explicit_multiple": f"Question: Which cities do the notes {numbers} name?\nAnswer:",
            "semantic_multiple": f"Question: To which cities were {special} sent?\nAnswer:",
            "global": "Question: Which city is named by most notes?\nAnswer:",
        }[self.ability]

    def parse(self, completion: str) -> list[str]:
        return list(dict.fromkeys(CITY.findall(completion)))

    def score(self, answer: Any, instance: Instance) -> float:
        """The share of the expected cities among as many as are expected, from the first."""
        expected = set(instance.answer)
        return len(set(answer[: len(expected)]) & expected) / len(expected)
