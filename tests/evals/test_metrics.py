"""Scores against values of the libraries that benchmarks use, and of their papers."""

import itertools
import random

import pytest

from lminf.evals import metrics


@pytest.mark.parametrize(
    ("found", "right", "f1", "recall"),
    [  # of rouge-score 0.1.2: RougeScorer(["rougeL"], use_stemmer=False)
        ("the cat sat on the mat", "the cat was on the mat", 0.833333, 0.833333),
        ("The quick brown fox jumps over the lazy dog.", "A fast brown fox leaps over lazy dogs",
         0.470588, 0.5),
        ("alpha beta gamma delta", "delta gamma beta alpha", 0.25, 0.25),
        ("police killed the gunman", "police kill the gunman", 0.75, 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5, 0.5),
        ("one-two three's", "one two three s", 1, 1),
        ("x", "", 0, 0),
    ],
)  # fmt: skip
def test_rouge_l_is_that_of_the_library(found, right, f1, recall):
    assert metrics.rouge_l(found, right) == pytest.approx(f1, abs=1e-6)
    assert metrics.rouge_l_recall(found, right) == pytest.approx(recall, abs=1e-6)


@pytest.mark.parametrize(
    ("one", "two", "similarity"),
    [  # of rapidfuzz 3: round(fuzz.ratio(one, two)) / 100
        ("this is a test", "this is a test!", 0.97),
        ("return x + 1", "return y + 1", 0.92),
        ("kitten", "sitting", 0.62),
        ("", "abc", 0),
        ("for i in range(n):", "for index in range(len(n)):", 0.8),
    ],
)
def test_edit_similarity_is_that_of_the_library(one, two, similarity):
    assert metrics.edit_similarity(one, two) == similarity
    assert metrics.edit_similarity(two, one) == similarity


def test_code_is_compared_by_its_first_line_without_comment_or_back_tick():
    assert metrics.code_similarity("\n```python\n# a comment\nx = 1\ny = 2", "x = 1") == 1
    assert metrics.code_similarity("```", "x = 1") == 0


def longest_common_by_table(one, two):
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, j in itertools.product(range(len(one)), range(len(two))):
        same = one[i] == two[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_that_of_the_table():
    drawn = random.Random(0)
    for _ in range(50):
        one, two = ("".join(drawn.choices("abcd", k=drawn.randint(0, 40))) for _ in range(2))
        assert metrics.longest_common(one, two) == longest_common_by_table(one, two)


@pytest.mark.parametrize(
    ("found", "right", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("in the city of Paris, France", "Paris", 2 * (1 / 5) / (1 / 5 + 1)),
        ("a cat a cat", "cat", 2 * 0.5 / 1.5),
        ("London", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_token_f1_drops_case_articles_and_punctuation(found, right, f1):
    assert metrics.token_f1(found, right) == pytest.approx(f1)


def test_characters_are_the_words_of_languages_without_spaces():
    assert metrics.character_f1("北京。", "北京") == 1
    assert metrics.character_f1("北京市", "北京") == pytest.approx(0.8)
    assert metrics.character_rouge_l("京北", "北京") == 0.5


def test_sets_are_compared_by_f1():
    assert metrics.set_f1({1, 2, 3}, {2, 3, 4, 5}) == pytest.approx(2 * 2 / 7)
    assert metrics.set_f1((), ()) == 1
    assert metrics.set_f1({1}, ()) == 0


def test_a_class_shares_its_point_with_the_others_that_are_named():
    classes = ("Number of something", "Number", "City", "Country")
    assert metrics.classified("City", "City", classes) == 1
    assert metrics.classified("City or Country", "City", classes) == 0.5
    assert metrics.classified("Number of something", "Number of something", classes) == 1
    assert metrics.classified("Country", "City", classes) == 0


def test_lists_are_scored_by_the_texts_that_an_answer_contains():
    assert metrics.string_match_all("It is 12, and ALPHA.", ["12", "alpha", "beta", "3"]) == 0.5


def test_of_several_numbers_each_counts_its_share():
    assert metrics.number_share("Paragraph 12", 12) == 1
    assert metrics.number_share("12 or 13", 12) == 0.5
    assert metrics.number_share("none", 12) == 0


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("The correct answer is (B).", "B"), ("The correct answer is C", "C"),
        ("**The correct answer is (D)**", "D"), ("A", "A"), ("(B) because A is wrong", "B"),
        ("A) yes\nThe answer is: C", "C"), ("I would say it is D", "D"), ("Nobody knows", None),
        ("", None), ("E", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_from_what_says_that_it_is_the_answer(completion, letter):
    assert metrics.letter_in(completion) == letter


def test_more_options_have_more_letters():
    assert metrics.letter_in("The answer is J", "ABCDEFGHIJ") == "J"


def fewest_exchanges(order):
    """By trying all sequences of exchanges, shortest first."""
    seen, front, steps = {order}, {order}, 0
    while tuple(sorted(order)) not in seen:
        front = {
            (*o[:i], o[j], *o[i + 1 : j], o[i], *o[j + 1 :])
            for o in front for i, j in itertools.combinations(range(len(o)), 2)
        }  # fmt: skip
        seen |= front
        steps += 1
    return steps


def test_deviations_of_orders_are_0_for_the_right_one_and_count_exchanges():
    right = ("a", "b", "c", "d")
    assert metrics.order_deviation(right, right) == (0, 0, 0, 0)
    assert metrics.order_deviation("bacd", right) == (0.5, 0.5, 1, 1)
    assert metrics.order_deviation("dbca", right) == (4.5, 1.5, 1, 3)
    assert metrics.order_deviation("dcba", right) == (5, 2, 2, 4)
    for order in itertools.permutations(range(5)):
        found = metrics.order_deviation(order, range(5))
        assert found.swap == fewest_exchanges(order)
        # Each exchange moves two things by its distance, and all must come home.
        assert found.swap_distance * 2 >= 5 * found.location_mean
    with pytest.raises(ValueError, match="are not orders of the same things"):
        metrics.order_deviation("aab", "abc")


def test_the_score_of_a_length_has_the_papers_points():
    points = {1000: 1, 4000: 0, 2500: 0.5, 500: 0.5, 333: 0, 5000: 0, 0: 0, 10: 0}
    for words, score in points.items():
        assert metrics.length_score(words, 1000) == pytest.approx(score, abs=2e-3)
    below = [metrics.length_score(words, 1000) for words in range(300, 1001, 50)]
    above = [metrics.length_score(words, 1000) for words in range(1000, 4200, 100)]
    assert below == sorted(below)
    assert above == sorted(above, reverse=True)


def test_ranks_that_fall_obey_and_ranks_that_rise_do_not():
    assert metrics.paired_mrr(1, 10) == pytest.approx(0.9)
    assert metrics.paired_mrr(10, 1) == pytest.approx(-0.9)
    assert metrics.paired_mrr(7, 7) == 0


def test_average_precision_is_the_mean_of_the_precisions_at_what_is_relevant():
    assert metrics.average_precision("abcd", {"a", "c"}) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.average_precision("abcd", {"d", "x"}) == pytest.approx((1 / 4 + 0) / 2)
    assert metrics.average_precision("abcd", set()) == 0


def test_ndcg_of_a_ranking_of_six_documents_is_that_of_its_published_calculation():
    # Wikipedia, "Discounted cumulative gain": DCG 6.861 of at most 8.740, nDCG 0.785.
    gains = {1: 3, 2: 2, 3: 3, 5: 1, 6: 2, 7: 3, 8: 2}
    assert metrics.ndcg([1, 2, 3, 4, 5, 6], gains, at=6) == pytest.approx(0.785, abs=5e-4)
    assert metrics.ndcg([4, 1], gains, at=1) == 0
    assert metrics.ndcg([7, 4], gains, at=1) == 1
    assert metrics.ndcg([1], {}, at=5) == 0
