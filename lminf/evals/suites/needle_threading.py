"""Needle Threading: values and chains of values in one long JSON object of random identifiers.

    single_needle       the value of a key
    multi_needle        the values of several keys, in the order asked
    conditional_needle  the values of all keys that hold a special character
    single_thread       the value at the end of a chain: each value is the key of the next pair
    multi_thread        the ends of several chains
    branched_thread     the end of the longest chain, where several pairs share each key that is due

Source: Roberts et al. 2024, arXiv:2411.05000. The sizes of the paper are characters; ours are those
of the budget. The prompt does not end in a space, which most tokenizers would join to the answer.
"""

import abc
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from lminf.evals.suites.generated import GeneratedTask, fill, index_at_depth
from lminf.evals.suites.suite_task import Instance
from lminf.evals.task import Budget
from lminf.ranges import Range

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
UUID_TOKENS = 48  # 36 where every character is one, and the marks between identifiers
Pair = tuple[str, str]
Placement = Literal["random", "clustered"]
Direction = Literal["forward", "backward", "random"]
Several = Annotated[int, Range(min=1, max=100)]

TASK = "Below is a JSON object of keys and values."
VALUE = "\nCorresponding value:"
VALUES = "\nCorresponding values:"


class NeedleThreadingTask(GeneratedTask):
    """Key-value pairs at random positions of a JSON haystack; a subclass samples them."""

    @property
    def expected(self) -> int:
        """The number of identifiers in an answer."""
        return 1

    @property
    def max_new_tokens(self) -> int:
        return UUID_TOKENS * self.expected

    @abc.abstractmethod
    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        """The pairs to hide, in the order of `needle_positions`; the question; its answers."""

    def needle_positions(
        self, random: np.random.Generator, count: int
    ) -> Callable[[int], list[int]]:
        """A function from the pairs of the haystack to the `count` indices of the needles."""
        shares = _rising(random, count)
        return lambda total: _spread(shares, total)

    def make_instance(self, budget: Budget, random: np.random.Generator) -> Instance:
        pairs, question, answers = self.sample_needles(random)
        where = self.needle_positions(random, len(pairs))
        hay: list[Pair] = []

        def prompt(total: int) -> str:
            hay.extend((random_uuid(random), random_uuid(random)) for _ in range(total - len(hay)))
            listed: list[Pair | None] = [None] * total
            for pair, index in zip(pairs, where(total), strict=True):
                listed[index] = pair
            rest = iter(hay)
            return "\n".join([TASK, to_json([each or next(rest) for each in listed]), question])

        filled = fill(budget, prompt, part="pair", min_parts=len(pairs))
        return Instance(filled.prompt, answers, filled.tokens)

    def parse(self, completion: str) -> list[str]:
        return UUID.findall(completion)

    def score(self, answer: Any, instance: Instance) -> float:
        """The share of the expected values among as many as are expected, from the first."""
        expected = instance.answer
        return len(set(answer[: len(expected)]) & set(expected)) / len(expected)


@dataclass(frozen=True)
class SingleNeedle(NeedleThreadingTask):
    """The value of one key."""

    depth: Annotated[float, Range(min=0, max=1)] = 0.5  # share of the other pairs before it

    name = "single_needle"
    scope, diffusion = "low", "low"
    levels = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        key, value = random_uuid(random), random_uuid(random)
        return [(key, value)], key_question(key), [value]

    def needle_positions(
        self, random: np.random.Generator, count: int
    ) -> Callable[[int], list[int]]:
        return lambda total: [index_at_depth(total, self.depth)]


@dataclass(frozen=True)
class MultiNeedle(NeedleThreadingTask):
    """The values of several keys."""

    needles: Several = 5
    placement: Placement = "random"

    name = "multi_needle"
    scope, diffusion = "high", "low"
    levels = ("needles", (2, 5, 10))

    @property
    def expected(self) -> int:
        return self.needles

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        pairs = [(random_uuid(random), random_uuid(random)) for _ in range(self.needles)]
        keys = ", ".join(f'"{key}"' for key, _ in pairs)
        question = f"Extract the values of these keys, in this order.\nKeys: {keys}{VALUES}"
        return pairs, question, [value for _, value in pairs]

    def needle_positions(
        self, random: np.random.Generator, count: int
    ) -> Callable[[int], list[int]]:
        if self.placement == "random":
            return super().needle_positions(random, count)
        start = random.random()
        return lambda total: list(range(first := int(start * (total - count + 1)), first + count))


@dataclass(frozen=True)
class ConditionalNeedle(MultiNeedle):
    """The values of all keys with a special character."""

    character: Literal["*", "&"] = "*"

    name = "conditional_needle"
    scope, diffusion = "high", "high"

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        pairs = []
        for _ in range(self.needles):
            key, index = random_uuid(random), int(random.integers(36))
            pairs.append((key[:index] + self.character + key[index + 1 :], random_uuid(random)))
        question = f"Extract the values of all keys that contain the character {self.character}."
        return pairs, question + VALUES, [value for _, value in pairs]


@dataclass(frozen=True)
class SingleThread(NeedleThreadingTask):
    """The last value of a chain of pairs."""

    thread_length: Annotated[int, Range(min=2, max=100)] = 5  # pairs of the chain
    direction: Direction = "forward"  # in which the chain runs through the text

    name = "single_thread"
    scope, diffusion = "low", "high"
    levels = ("thread_length", (2, 5, 10))

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        chain = random_thread(random, self.thread_length)
        return chain, thread_question(chain[0][0]), [chain[-1][1]]

    def needle_positions(
        self, random: np.random.Generator, count: int
    ) -> Callable[[int], list[int]]:
        shares = _directed(random, _rising(random, count), self.direction)
        return lambda total: _spread(shares, total)


@dataclass(frozen=True)
class MultiThread(NeedleThreadingTask):
    """The last values of several chains."""

    threads: Several = 3
    thread_length: Annotated[int, Range(min=2, max=100)] = 3
    direction: Direction = "forward"

    name = "multi_thread"
    scope, diffusion = "high", "high"
    levels = ("threads", (2, 3, 5))

    @property
    def expected(self) -> int:
        return self.threads

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        chains = [random_thread(random, self.thread_length) for _ in range(self.threads)]
        keys = ", ".join(f'"{chain[0][0]}"' for chain in chains)
        question = (
            "A value may be the key of another pair. From each of these keys follow the values to "
            f"the one that is no key, and extract these last values.\nKeys: {keys}{VALUES}"
        )
        return list(itertools.chain(*chains)), question, [chain[-1][1] for chain in chains]

    def needle_positions(
        self, random: np.random.Generator, count: int
    ) -> Callable[[int], list[int]]:
        """Each chain runs in the direction; chains cross."""
        shares = random.permutation(_rising(random, count)).reshape(
            self.threads, self.thread_length
        )
        directed = np.concatenate(
            [_directed(random, np.sort(row), self.direction) for row in shares]
        )
        return lambda total: _spread(directed, total)


@dataclass(frozen=True)
class BranchedThread(NeedleThreadingTask):
    """The last value of the longest chain: at every step all branches but one end a pair later."""

    thread_length: Annotated[int, Range(min=2, max=100)] = 5
    branches: Annotated[int, Range(min=2, max=100)] = 2  # pairs that share each key but the last

    name = "branched_thread"
    scope, diffusion = "low", "high"
    levels = ("thread_length", (2, 5, 10))

    def sample_needles(self, random: np.random.Generator) -> tuple[list[Pair], str, list[str]]:
        chain = random_thread(random, self.thread_length)
        # Of all keys but the last: a dead end there would be as long as the chain.
        dead = [
            (key, random_uuid(random)) for key, _ in chain[:-1] for _ in range(self.branches - 1)
        ]
        question = (
            "A value may be the key of other pairs, and several pairs may have the same key. From "
            "this key follow the values along the longest chain to the one that is no key, and "
            f'extract that last value.\nKey: "{chain[0][0]}"{VALUE}'
        )
        return chain + dead, question, [chain[-1][1]]


# --- Identifiers and places -----------------------------------------------------------------------


def random_uuid(random: np.random.Generator) -> str:
    """32 random hexadecimal digits in the form 8-4-4-4-12; two are equal once in 2^64."""
    digits = random.bytes(16).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def random_thread(random: np.random.Generator, length: int) -> list[Pair]:
    """A chain of pairs: each value is the key of the next."""
    links = [random_uuid(random) for _ in range(length + 1)]
    return list(itertools.pairwise(links))


def to_json(pairs: Sequence[Pair]) -> str:
    """The pairs as a JSON object on one line. Not by a dictionary, because keys may repeat."""
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def key_question(key: str) -> str:
    """The question about one key."""
    return f'Extract the value of this key.\nKey: "{key}"{VALUE}'


def thread_question(key: str) -> str:
    """The question about the end of a chain."""
    return (
        "A value may be the key of another pair. From this key follow the values to the one that "
        f'is no key, and extract that last value.\nKey: "{key}"{VALUE}'
    )


def _rising(random: np.random.Generator, count: int) -> np.ndarray:
    """Shares of the haystack in rising order."""
    return np.sort(random.random(count))


def _directed(random: np.random.Generator, shares: np.ndarray, direction: Direction) -> np.ndarray:
    """Rising shares in the order in which a chain visits them."""
    if direction == "random":
        return random.permutation(shares)
    return shares if direction == "forward" else shares[::-1]


def _spread(shares: np.ndarray, total: int) -> list[int]:
    """Different indices below `total` in the order of the shares, close to them."""
    ranks = np.argsort(np.argsort(shares, kind="stable"), kind="stable")
    rising = np.sort((np.sort(shares) * (total - len(shares) + 1)).astype(int))
    return [int(rising[rank] + rank) for rank in ranks]
