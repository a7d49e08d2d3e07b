"""Transforms are functions of an example and its key, and of nothing that came before."""

import dataclasses

import numpy as np
import pytest

from lminf.data import transforms
from lminf.data.transforms import CompletionOnly, FillInTheMiddle, PerSequence
from lminf.errors import InputError
from tests import stated_ranges

PREFIX, SUFFIX, MIDDLE, BOS, END = 100, 101, 102, 103, 104
FILL = FillInTheMiddle(PREFIX, SUFFIX, MIDDLE)
EXAMPLES = [{"tokens": np.arange(1, 2 + size, dtype=np.int32)} for size in (3, 0, 20, 9, 30) * 8]


def twice(example, key):
    """Two examples, each with a token of the key that it was made under."""
    return [
        {"tokens": np.append(example["tokens"], 1000 * key[2] + 10 * key[3] + copy)}
        for copy in (0, 1)
    ]


def as_lists(made):
    return [[{k: v.tolist() for k, v in each.items()} for each in examples] for examples in made]


def test_an_example_depends_on_the_seed_and_its_index_alone():
    made = transforms.apply([twice, FILL], EXAMPLES, seed=3)
    whole = as_lists(made)
    assert len(made) == len(EXAMPLES)
    assert {len(examples) for examples in made} == {2}
    backwards = [made[index] for index in reversed(range(len(made)))]
    assert as_lists(backwards[::-1]) == whole
    for start in (0, 1, 17, len(EXAMPLES)):  # resumed
        assert as_lists(made[start:]) == whole[start:]
    assert as_lists([made[-1]]) == whole[-1:]
    assert as_lists(transforms.apply([twice, FILL], EXAMPLES, seed=4)) != whole


def test_transforms_follow_one_another_each_with_keys_of_its_own():
    (made,) = transforms.apply([twice, twice], EXAMPLES[1:2], seed=0)
    assert [each["tokens"].tolist() for each in made] == [
        [1, 0, 1000], [1, 0, 1001], [1, 1, 1010], [1, 1, 1011]
    ]  # fmt: skip
    kept = transforms.apply([lambda example, key: [example] * (key[1] % 2)], EXAMPLES, seed=0)
    assert [len(examples) for examples in kept[:4]] == [0, 1, 0, 1]


def test_nothing_is_made_before_it_is_read():
    read = []

    class Corpus(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    made = transforms.apply([FILL], Corpus(EXAMPLES), seed=0)
    _ = made[5:9][2]
    assert read == [7]


# --- Fill-in-the-middle ---------------------------------------------------------------------------


def parts_of(tokens):
    """(prefix, middle, suffix) of a document that was transformed, and whether it is SPM."""
    tokens = tokens.tolist()
    assert tokens[0] == PREFIX
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    if suffix == 1:
        return [], tokens[middle + 1 :], tokens[2:middle], True  # prefix and middle are joined
    return tokens[1:suffix], tokens[middle + 1 :], tokens[suffix + 1 : middle], False


def test_the_document_comes_back_from_its_parts():
    always = dataclasses.replace(FILL, rate=1.0)
    kinds, firsts = [], []
    for (made,), example in zip(
        transforms.apply([always], EXAMPLES, seed=0), EXAMPLES, strict=True
    ):
        assert made["tokens"].dtype == np.int32
        prefix, middle, suffix, spm = parts_of(made["tokens"])
        np.testing.assert_array_equal(prefix + middle + suffix, example["tokens"])
        kinds.append(spm)
        firsts.append(len(prefix))
    assert 10 < sum(kinds) < 30  # of 40, at a rate of a half
    assert len(set(firsts)) > 5


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.0, 0.5), (0.25, 0.0), (0.75, 1.0)])
def test_rates_are_shares_of_the_documents(rate, spm_rate):
    fill = dataclasses.replace(FILL, rate=rate, spm_rate=spm_rate)
    examples = EXAMPLES[2:3] * 400
    made = [each["tokens"] for (each,) in transforms.apply([fill], examples, seed=0)]
    filled = [parts_of(tokens) for tokens in made if tokens[0] == PREFIX]
    # Four standard deviations of a share of 400.
    assert abs(len(filled) / 400 - rate) <= 4 * (rate * (1 - rate) / 400) ** 0.5
    # With an empty prefix PSM is SPM: 9 % of cuts of 20 tokens.
    spm = sum(spm for *_, spm in filled)
    assert spm == len(filled) if spm_rate else spm <= 0.25 * len(filled)
    assert all(len(tokens) == 21 for tokens in made if tokens[0] != PREFIX)


def test_both_cuts_are_uniform_over_the_places_between_tokens():
    fill = dataclasses.replace(FILL, rate=1.0, spm_rate=0.0)
    made = transforms.apply([fill], [{"tokens": np.arange(1, 4)}] * 4000, seed=1)
    sizes = [tuple(map(len, parts_of(each["tokens"])[:2])) for (each,) in made]
    # Two of four places: each pair of different ones twice as often as each pair of equal ones.
    for prefix in range(4):
        for middle in range(4 - prefix):
            expected = 4000 * (1 if middle == 0 else 2) / 16
            assert abs(sizes.count((prefix, middle)) - expected) < 4 * expected**0.5


def test_markers_of_a_document_stay_outside_and_weights_move_with_their_tokens():
    fill = dataclasses.replace(FILL, rate=1.0, bos_id=BOS, end_id=END)
    tokens = np.array([BOS, *range(1, 8), END], np.int32)
    example = {"tokens": tokens, "weights": tokens.astype(np.float32)}
    for seed in range(8):
        ((made,),) = transforms.apply([fill], [example], seed=seed)
        assert made["tokens"][0] == BOS
        assert made["tokens"][-1] == END
        sentinel = np.isin(made["tokens"], [PREFIX, SUFFIX, MIDDLE])
        np.testing.assert_array_equal(
            made["weights"], np.where(sentinel, 1, made["tokens"]).astype(np.float32)
        )
        parts = parts_of(made["tokens"][1:-1])
        assert [*parts[0], *parts[1], *parts[2]] == list(range(1, 8))
    ((empty,),) = transforms.apply([fill], [{"tokens": np.array([BOS, END])}], seed=0)
    assert sorted(empty["tokens"].tolist()) == [PREFIX, SUFFIX, MIDDLE, BOS, END]


# --- Completion only ------------------------------------------------------------------------------


def test_only_what_follows_the_response_template_counts():
    example = {"tokens": np.array([5, 9, 8, 9, 9, 8, 7, 9, 8])}
    ((made,),) = transforms.apply([CompletionOnly((9, 8))], [example], seed=0)
    np.testing.assert_array_equal(made["weights"], [0, 0, 0, 1, 1, 1, 1, 1, 1])
    weighed = example | {"weights": np.full(9, 0.5, np.float32)}
    ((made,),) = transforms.apply([CompletionOnly((9, 9, 8))], [weighed], seed=0)
    np.testing.assert_array_equal(made["weights"], [0, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(weighed["weights"], np.full(9, 0.5))  # not changed in place


# --- Weights --------------------------------------------------------------------------------------


def test_per_sequence_gives_each_document_the_same_say():
    """The loss is the mean of the documents' means; per token it is the mean of all tokens."""
    rng = np.random.default_rng(0)
    sizes, nll = [2, 9, 1, 5], rng.random(17)
    segments = np.repeat(np.arange(4), sizes)
    weights = np.array([0, 1, 0, 0, 1, 1, 1, 1, 0.5, 1, 1, 1, 1, 0, 0, 0, 0], np.float32)
    example = {"tokens": np.arange(17), "segments": segments, "weights": weights}
    ((made,),) = transforms.apply([PerSequence()], [example], seed=0)
    assert made["weights"].dtype == np.float32
    means = []
    for document in range(4):
        place = np.flatnonzero(segments == document)[1:]  # nothing predicts the first token
        if weights[place].sum():
            assert made["weights"][place].sum() == pytest.approx(1)
            means.append(np.average(nll[place], weights=weights[place]))
        else:
            assert not made["weights"][segments == document].any()
    assert len(means) == 2
    assert np.average(nll, weights=made["weights"]) == pytest.approx(np.mean(means))
    ((alone,),) = transforms.apply([PerSequence()], [{"tokens": np.arange(5)}], seed=0)
    np.testing.assert_array_equal(alone["weights"], [0, 0.25, 0.25, 0.25, 0.25])
    ((none,),) = transforms.apply([PerSequence()], [{"tokens": np.arange(0)}], seed=0)
    assert none["weights"].shape == (0,)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [FILL, CompletionOnly((3,))], ids=lambda s: type(s).__name__)
def test_numbers_outside_their_range_are_refused_by_field(sample):
    assert stated_ranges.without_range(type(sample)) == []
    for field, value in stated_ranges.outside(type(sample)):
        with pytest.raises(InputError, match=rf"^{type(sample).__name__}\.{field} is .*; give "):
            dataclasses.replace(sample, **{field: value})


def test_what_cannot_be_transformed_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="give three different ones"):
        FillInTheMiddle(1, 2, 1)
    with pytest.raises(InputError, match="the response template has no tokens"):
        CompletionOnly(())
    with pytest.raises(InputError, match="seed is -1; give a whole number"):
        transforms.apply([FILL], EXAMPLES, seed=-1)
    packed = [{"tokens": np.arange(4), "segments": np.array([0, 0, 1, 1])}]
    with pytest.raises(InputError, match="this example has segments"):
        _ = transforms.apply([FILL], packed, seed=0)[0]
    examples = [{"tokens": np.arange(3)}, {"tokens": np.arange(1)}]
    for index in (0, 1):
        with pytest.raises(InputError, match=rf"example {index} has no response template \(7, 8\)"):
            _ = transforms.apply([CompletionOnly((7, 8))], examples, seed=0)[index]
