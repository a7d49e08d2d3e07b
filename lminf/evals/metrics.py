"""Scores of a completion against a reference, as benchmarks define them: pure functions of text.

All are shares from 0 to 1 unless they say otherwise. Sources: LongBench (Bai et al. 2024,
arXiv:2308.14508) for F1, classes and edit similarity; Rouge-L of Lin 2004; RULER (Hsieh et al.
2024, arXiv:2404.06654) for lists; LooGLE (Li et al. 2024, arXiv:2311.04939) for orders; LongWriter
(Bai et al. 2024, arXiv:2408.07055) for lengths; FollowIR (Weller et al. 2024, arXiv:2403.15246) for
ranks.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lminf.errors import InputError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """The words in lower case, without punctuation and articles, as SQuAD compares them."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def bag_f1(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """F1 of two bags."""
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def token_f1(completion: str, reference: str) -> float:
    """F1 of the words of an answer, as for SQuAD."""
    return bag_f1(normalized(completion), normalized(reference))


def character_f1(completion: str, reference: str) -> float:
    """F1 of the characters, for languages without spaces. LongBench cuts words by jieba instead, so
    its scores of Chinese answers differ.
    """
    return bag_f1(_characters(completion), _characters(reference))


def set_f1(predicted: Collection[Hashable], expected: Collection[Hashable]) -> float:
    """F1 of two sets; 1 where both are empty."""
    one, two = set(predicted), set(expected)
    return 2 * len(one & two) / (len(one) + len(two)) if one or two else 1.0


def longest_common(one: Sequence[Hashable], two: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence.

    Row by row over the bits of one integer: Crochemore et al. 2001, Inf. Process. Lett. 80:279.
    """
    places: dict[Hashable, int] = {}
    for index, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << index
    everywhere = (1 << len(one)) - 1
    row = everywhere
    for item in two:
        matches = row & places.get(item, 0)
        row = (row + matches | row - matches) & everywhere
    return len(one) - row.bit_count()


def rouge_l(completion: str, reference: str) -> float:
    """F1 of the longest common subsequence of words: lower case, letters and digits alone, without
    stemming, as rouge-score 0.1.2 computes it.
    """
    words, expected = _rouge_words(completion), _rouge_words(reference)
    common = longest_common(words, expected)
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def rouge_l_recall(completion: str, reference: str) -> float:
    """The share of the reference's words in the longest common subsequence."""
    expected = _rouge_words(reference)
    return longest_common(_rouge_words(completion), expected) / len(expected) if expected else 0.0


def character_rouge_l(completion: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters, for languages without spaces."""
    characters, expected = _characters(completion), _characters(reference)
    common = longest_common(characters, expected)
    return 2 * common / (len(characters) + len(expected)) if common else 0.0


def bleu(completion: str, reference: str, *, tokenize: Literal["13a", "zh"]) -> float:
    """BLEU of one text, of up to four words in a row, or characters of Chinese (`zh`), by sacrebleu
    (Post 2018, arXiv:1804.08771). n-gram precisions of zero are smoothed exponentially.
    """
    try:
        import sacrebleu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "translations are scored by sacrebleu, which is not installed; run pip install "
            "'lminf[translation]'"
        ) from error
    scored = sacrebleu.sentence_bleu(completion, [reference], tokenize=tokenize)
    return min(scored.score / 100, 1.0)  # of equal texts it is a rounding error more


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _characters(text: str) -> str:
    """Letters and digits of any script, without punctuation, symbols and spaces."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PSZC")


def edit_similarity(completion: str, reference: str) -> float:
    """2 x (longest common subsequence) / (both lengths), in characters: the ratio of Levenshtein's
    insertions and deletions, rounded to 0.01 as LongBench has it. Two empty texts are equal.
    """
    total = len(completion) + len(reference)
    if not total:
        return 1.0
    return round(2 * longest_common(completion, reference) / total, 2)


def code_similarity(completion: str, reference: str) -> float:
    """Edit similarity of the first line that has no back-tick and no comment."""
    lines = completion.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return edit_similarity(next(code, ""), reference)


def classified(completion: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that an answer names, if the right one is among them; names that
    are only part of the right one's do not count.
    """
    named = [name for name in classes if name in completion]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def number_share(completion: str, number: int) -> float:
    """The share of the numbers of an answer that are the right one."""
    numbers = [int(digits) for digits in re.findall(r"[0-9]+", completion)]
    return numbers.count(number) / len(numbers) if numbers else 0.0


def string_match_all(completion: str, expected: Sequence[str]) -> float:
    """The share of the expected texts that an answer contains, in any case, as RULER has it."""
    return sum(text.lower() in completion.lower() for text in expected) / len(expected)


def numbers_in(completion: str) -> frozenset[int]:
    """The whole numbers that an answer lists."""
    return frozenset(int(digits) for digits in re.findall(r"[0-9]{1,9}", completion))


def letter_in(completion: str, letters: str = "ABCD") -> str | None:
    """The letter of the option that an answer chooses: after `answer is`, else one on its own at
    the start, else the last one on its own. None: it chooses none.
    """
    text, one = completion.replace("*", ""), f"[{letters}]"
    for pattern in (rf"answer is:?\s*\(?({one})\b", rf"^\W*({one})\b"):
        if match := re.search(pattern, text, re.IGNORECASE if "answer" in pattern else 0):
            return match[1].upper()
    alone = re.findall(rf"\b({one})\b(?!')", text)
    return alone[-1] if alone else None


class OrderDeviation(NamedTuple):
    """How far an order of n things is from the right one; 0 for equal orders."""

    location_square: float  # mean squared distance of a thing from its place
    location_mean: float  # mean distance
    swap: int  # the fewest exchanges of two things that put all in place
    swap_distance: int  # places that the exchanges move, the most useful ones first


def order_deviation(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> OrderDeviation:
    """Deviations of two orders of the same things, as LooGLE scores a timeline."""
    if sorted(map(repr, predicted)) != sorted(map(repr, expected)):
        raise ValueError(f"{predicted} and {expected} are not orders of the same things")
    rank = {item: index for index, item in enumerate(expected)}
    order = [rank[item] for item in predicted]
    distances = [abs(place - index) for index, place in enumerate(order)]
    return OrderDeviation(
        sum(distance**2 for distance in distances) / len(order),
        sum(distances) / len(order),
        len(order) - _cycles(order),
        _swapped_distance(order),
    )


def _cycles(order: Sequence[int]) -> int:
    seen: set[int] = set()
    count = 0
    for start in order:
        count += start not in seen
        while start not in seen:
            seen.add(start)
            start = order[start]
    return count


def _swapped_distance(order: Sequence[int]) -> int:
    """Exchanges the two things that come nearer to their places by most for each place moved."""
    order, total = list(order), 0

    def gain(pair: tuple[int, int]) -> float:
        i, j = pair
        distance = abs(order[i] - i) + abs(order[j] - j)
        return (distance - abs(order[j] - i) - abs(order[i] - j)) / (j - i)

    pairs = [(i, j) for i in range(len(order)) for j in range(i + 1, len(order))]
    while any(place != index for index, place in enumerate(order)):
        i, j = max(pairs, key=gain)
        order[i], order[j] = order[j], order[i]
        total += j - i
    return total


def length_score(words: int, requested: int) -> float:
    """How well a text has the length asked for: 1, falling to 0 at four times and at a third."""
    if words <= 0:
        return 0.0
    far = (words / requested - 1) / 3 if words > requested else (requested / words - 1) / 2
    return max(0.0, 1 - far)


def paired_mrr(old_rank: int, new_rank: int) -> float:
    """-1 to 1: how a document that an instruction rules out moves in the ranking; 0: not at all.

    Ranks begin at 1. It is above 0 where the document falls, which is what the instruction asks.
    """
    if new_rank >= old_rank:
        return 1 - old_rank / new_rank
    return new_rank / old_rank - 1


def average_precision(ranking: Sequence[Hashable], relevant: Collection[Hashable]) -> float:
    """The mean, over what is relevant, of the precision at its place; what is missing has 0."""
    hits, total = 0, 0.0
    for place, item in enumerate(ranking, 1):
        if item in relevant:
            hits += 1
            total += hits / place
    return total / len(relevant) if relevant else 0.0


def ndcg(ranking: Sequence[Hashable], gains: Mapping[Any, float], *, at: int) -> float:
    """The gains of the first items, each divided by log2(1 + its place), as a share of the most
    that a ranking can have. Gains are the judgements, as trec_eval has them, and positive.
    """

    def discounted(values: Sequence[float]) -> float:
        return sum(value / math.log2(place + 1) for place, value in enumerate(values[:at], 1))

    best = discounted(sorted(gains.values(), reverse=True))
    return discounted([gains.get(item, 0) for item in ranking]) / best if best else 0.0
