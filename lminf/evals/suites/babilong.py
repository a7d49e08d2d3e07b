"""BABILong's form: facts about people, places and things among sentences of real prose.

    facts=1   where somebody is: the last of their moves
    facts=2   where a thing is: who took it, and where they went
    facts=3   where a thing was before: who carried it, and where they came from

Source: Kuratov et al. 2024, arXiv:2406.10149, over tasks 1 to 3 of bAbI (Weston et al. 2015,
arXiv:1502.05698). The world and its sentences are generated here.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lminf.errors import InputError
from lminf.evals.suites.generated import SharedTextTask, fill
from lminf.evals.suites.ruler import Several, insert_in_prose
from lminf.evals.suites.suite_task import Answers, Instance
from lminf.evals.task import Budget

PEOPLE = ("Mary", "John", "Sandra", "Daniel", "Emily", "Victor")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("apple", "football", "milk", "lantern")
MOVE = "{who} went to the {where}."
WHERE = "\nWhere is {who}? {who} is in the"
MOVES = 8  # sentences about moves that do not matter to the answer


@dataclass(frozen=True)
class BABILong(SharedTextTask):
    """The place of a person or a thing, from one, two or three facts in the text."""

    facts: Literal[1, 2, 3] = 1
    text: str | None = None  # a file of prose; none: the interpreter's documentation
    answers: Answers = "written"
    questions: Several = 1  # asked of one text, each about another person; of facts=1

    name = "babilong"
    scope, diffusion = "low", "high"
    levels = ("facts", (1, 2, 3))
    max_new_tokens = 10

    def __post_init__(self):
        super().__post_init__()
        if self.questions > (most := len(PEOPLE) if self.facts == 1 else 1):
            raise InputError(
                f"babilong: {self.questions} questions of a text with facts={self.facts}, which "
                f"answers {most}; give at most questions={most}, or facts=1 for up to {len(PEOPLE)}"
            )

    def make_instances(self, budget: Budget, random: np.random.Generator) -> list[Instance]:
        story, answers = self._story(random)
        body = insert_in_prose(story, sorted(random.random(len(story))), self.text, random.random())
        task = (
            "Facts about people are hidden in the following text. Answer the question from the "
            "latest facts.\n"
        )
        longest = max(answers, key=budget.count)
        filled = fill(budget, lambda count: task + body(count) + longest, part="sentence")
        shared = filled.prompt.removesuffix(longest)
        options = tuple(f" {place}" for place in PLACES)
        return [
            Instance(prompt, answer, budget.count(prompt), options=options)
            for question, answer in answers.items()
            for prompt in [shared + question]
        ]

    def _story(self, random: np.random.Generator) -> tuple[list[str], dict[str, str]]:
        """Facts in order, and the questions with their answers."""
        hero, *bystanders = (str(name) for name in random.permutation(PEOPLE))
        thing = str(random.choice(THINGS))
        route = [str(place) for place in random.permutation(PLACES)]
        moves = [(str(random.choice(bystanders)), str(random.choice(PLACES))) for _ in range(MOVES)]
        subjects = bystanders[: self.questions - 1]  # each of whom moves
        moves[: len(subjects)] = [
            (who, where) for who, (_, where) in zip(subjects, moves, strict=False)
        ]
        story = [MOVE.format(who=who, where=where) for who, where in moves]
        trips = [MOVE.format(who=hero, where=where) for where in route[:3]]
        if self.facts == 1:
            facts, answer = trips, route[2]
            question = WHERE.format(who=hero)
        elif self.facts == 2:
            facts, answer = [trips[0], f"{hero} took the {thing}.", *trips[1:]], route[2]
            question = f"\nWhere is the {thing}? The {thing} is in the"
        else:
            facts, answer = [trips[0], f"{hero} took the {thing}.", *trips[1:]], route[1]
            question = (
                f"\nWhere was the {thing} before the {route[2]}? "
                f"Before the {route[2]} the {thing} was in the"
            )
        # The hero's facts keep their order among the others.
        for share, fact in zip(sorted(random.random(len(facts)))[::-1], facts[::-1], strict=True):
            story.insert(int(share * (MOVES + 1)), fact)
        last = dict(moves)  # of the moves of one person the last
        return story, {question: answer} | {WHERE.format(who=who): last[who] for who in subjects}

    def parse(self, completion: str) -> str | None:
        """The first place that is named."""
        named = re.search("|".join(PLACES), completion.lower())
        return named[0] if named else None
