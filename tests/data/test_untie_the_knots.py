"""Untie the Knots: what a tied row holds, read from its tokens alone, and what is not learned."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.config import parse_choice
from lminf.data import loader, store, transforms
from lminf.data.loader import Loader, parse_plan, parse_transforms
from lminf.data.untie_the_knots import Backtracing, UntieTheKnots, untie
from lminf.errors import InputError
from tests import stated_ranges

END, KNOTS = 0, (1, 2, 3, 4)
OPEN, CLOSE, LIST, BETWEEN, CLOSE_LIST = HEADS = (5, 6, 7, 8, 9)
LETTERS = tuple(range(10, 20))
FIRST = 100  # of the tokens that texts hold
ALWAYS = UntieTheKnots(END, KNOTS, weights=(1.0,), laws=((0.2, 0.3, 0.5),))
TRACED = dataclasses.replace(ALWAYS, backtracing=Backtracing(*HEADS, LETTERS))
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def sequence(sizes, *, whole=True):
    """Documents of different tokens, each with its end; the last one may be cut off before it."""
    tokens = np.arange(FIRST, FIRST + sum(sizes), dtype=np.int32)
    tokens[np.cumsum(sizes) - 1] = END
    return tokens if whole or sizes[-1] == 1 else tokens[:-1]


def chunks_of(tied):
    """[tokens] of the chunks of a tied sequence without backtracing, as its tokens show them."""
    chunks, current = [], []
    for token in tied.tokens.tolist():
        if token in KNOTS[1::2] and current:  # which begin a chunk
            chunks.append(current)
            current = []
        current.append(token)
        if token in KNOTS[::2] or token == END:  # which end one
            chunks.append(current)
            current = []
    return [*chunks, current] if current else chunks


@settings(max_examples=25)
@given(SIZES, st.booleans(), st.sampled_from([ALWAYS, TRACED]), st.integers(0, 5))
def test_the_documents_come_back_and_no_token_is_lost(sizes, whole, transform, seed):
    tokens = sequence(sizes, whole=whole)
    tied = transform.tie(tokens, (seed, 3))
    np.testing.assert_array_equal(untie(tied), tokens)
    inserted = tied.tokens[tied.sources < 0]
    assert np.isin(inserted, (*KNOTS, *HEADS, *LETTERS)).all()
    left = np.delete(tied.tokens, np.flatnonzero(tied.sources < 0))
    np.testing.assert_array_equal(np.sort(left), np.sort(tokens))
    again = transform.tie(tokens, (seed, 3))
    for one, other in zip(tied, again, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=25)
@given(SIZES, st.integers(0, 5), st.sampled_from(["shuffled", "partial"]))
def test_knots_tell_the_number_of_each_chunk(sizes, seed, order):
    """Read without provenance: the tokens of a document rise, and its chunks with them."""
    tokens = sequence(sizes)
    tied = dataclasses.replace(ALWAYS, order=order).tie(tokens, (seed, 0))
    starts = np.cumsum(sizes) - sizes + FIRST
    of_document = {}
    chunks = chunks_of(tied)
    for chunk in chunks:
        text = [t for t in chunk if t not in KNOTS]
        # A chunk that is an end alone belongs to a document whose other chunks say so.
        document = int(np.searchsorted(starts, text[0], side="right")) if text != [END] else None
        of_document.setdefault(document, []).append(chunk)
    for document, parts in of_document.items():
        if document is None:
            continue
        parts = parts if order == "partial" else sorted(parts, key=lambda c: max(c))
        for number, chunk in enumerate(parts):
            before = [KNOTS[2 * number - 1]] if number else []
            assert [t for t in chunk[:1] if t in KNOTS] == before
            if chunk[-1] != END:
                assert chunk[-1] in (KNOTS[2 * number], max(chunk))
    last = sequence(sizes)[-2:].tolist()
    assert tied.tokens[-1] == END
    if len(last) == 2 and chunks[-1] not in ([END], [KNOTS[1], END], [KNOTS[3], END]):
        assert chunks[-1][-2] == last[0]


def test_cuts_are_uniform_and_the_shares_those_of_the_laws():
    tokens = sequence([5])
    law = UntieTheKnots(END, KNOTS, weights=(0.25, 0.75), laws=((1.0,), (0.2, 0.0, 0.8)))
    edges, counts = [], {1: 0, 2: 0, 3: 0}
    for index in range(600):
        tied = law.tie(tokens, (0, index))
        chunks = 1 + int(np.isin(tied.tokens, KNOTS).sum()) // 2
        counts[chunks] += 1
        if chunks == 3:
            begins = tied.sources[1:][np.isin(tied.tokens[:-1], KNOTS[1::2])]
            edges.append(tuple(sorted(begins.tolist())))
    assert counts[2] == 0
    assert abs(counts[3] / 600 - 0.6) < 4 * (0.6 * 0.4 / 600) ** 0.5
    pairs = list(itertools.combinations(range(1, 5), 2))
    assert set(edges) == set(pairs)
    expected = len(edges) / len(pairs)
    assert all(abs(edges.count(pair) - expected) < 4 * expected**0.5 for pair in pairs)


def test_the_order_of_chunks_is_uniform_but_for_the_last():
    halves = UntieTheKnots(END, KNOTS[:2], weights=(1.0,), laws=((0.0, 1.0),), cuts="equal")
    tokens = sequence([4, 6])
    seen = [tuple(halves.tie(tokens, (0, i)).sources.tolist()) for i in range(480)]
    kept = [tuple(s for s in row if s >= 0) for row in seen]
    parts = [(0, 1), (2, 3), (4, 5, 6)]
    orders = [(*sum(order, ()), 7, 8, 9) for order in itertools.permutations(parts)]
    assert set(kept) == set(orders)
    assert all(abs(kept.count(order) - 80) < 4 * 80**0.5 for order in orders)
    partial = dataclasses.replace(halves, order="partial")
    kept = {tuple(s for s in partial.tie(tokens, (0, i)).sources.tolist() if s >= 0)
            for i in range(80)}  # fmt: skip
    assert kept == {order for order in orders if order.index(0) < order.index(2)}


def test_short_documents_stay_whole_and_rows_that_are_not_knotted_stay_as_they_are():
    never = dataclasses.replace(UntieTheKnots(END, KNOTS), weights=(1.0, 0.0))
    tokens = sequence([3, 9, 1, 4])
    ((made,),) = transforms.apply([never], [{"tokens": tokens}], seed=0)
    np.testing.assert_array_equal(made["tokens"], tokens)
    np.testing.assert_array_equal(made["weights"], np.ones(len(tokens)))
    thirds = dataclasses.replace(ALWAYS, laws=((0.0, 0.0, 1.0),))
    tied = thirds.tie(sequence([2, 2, 1]), (0, 0))
    assert sorted(tied.sources.tolist()) == [0, 1, 2, 3, 4]


def masked(tokens):
    """Weight of every target, from the rules of §2.2 and the tokens alone."""
    inside_header, header = False, []
    for token in tokens:
        inside_header = inside_header or token == OPEN
        header.append(inside_header)
        inside_header = inside_header and token != CLOSE
    weights = [1.0]
    for position in range(len(tokens) - 1):
        read, label = tokens[position], tokens[position + 1]
        ignored = (
            read in KNOTS
            or label in KNOTS
            or header[position]
            or label in (OPEN, LIST)
            or read == CLOSE_LIST
        )
        weights.append(0.0 if ignored else 1.0)
    return weights


@settings(max_examples=25)
@given(SIZES, st.integers(0, 5), st.sampled_from([ALWAYS, TRACED]))
def test_the_mask_covers_the_listed_positions_and_no_other(sizes, seed, transform):
    tokens = sequence(sizes)
    tied = transform.tie(tokens, (seed, 1))
    expected = masked(tied.tokens.tolist())
    expected[0] = tied.weights[0]  # nothing predicts the first token
    np.testing.assert_array_equal(tied.weights, expected)
    example = {"tokens": tokens, "weights": np.where(tokens == END, 0.5, 2).astype(np.float32)}
    (made,) = transform(example, (seed, 1))
    count = len(tokens)
    np.testing.assert_array_equal(made["tokens"], tied.tokens[:count])
    given_weights = np.where(made["tokens"] == END, 0.5, np.where(tied.sources[:count] < 0, 1, 2))
    np.testing.assert_array_equal(made["weights"], given_weights * tied.weights[:count])
    assert made["weights"].dtype == np.float32


@settings(max_examples=25)
@given(SIZES, st.integers(0, 5))
def test_the_list_of_a_document_names_its_chunks_in_their_order(sizes, seed):
    tied = TRACED.tie(sequence(sizes), (seed, 2))
    tokens, sources = tied.tokens.tolist(), tied.sources.tolist()
    first_of, lists = {}, []
    for place, token in enumerate(tokens):
        if token == OPEN:
            name = tuple(tokens[place + 1 : place + 7])
            assert tokens[place + 7] == CLOSE
            assert set(name) <= set(LETTERS)
            first_of[name] = next(s for s in sources[place:] if s >= 0)
        if token == LIST:
            end = tokens.index(CLOSE_LIST, place)
            names = tokens[place + 1 : end]
            assert names[6::7] == [BETWEEN] * (len(names) // 7)
            lists.append([tuple(names[i : i + 6]) for i in range(0, len(names), 7)])
            assert all(name in first_of for name in lists[-1])  # it stands after the last chunk
    starts = np.cumsum(sizes) - sizes
    for names in lists:
        found = [first_of[name] for name in names]
        assert found == sorted(found)
        assert len(set(np.searchsorted(starts, found, side="right"))) == 1
    assert sorted(name for names in lists for name in names) == sorted(first_of)


# --- In rows of a plan ----------------------------------------------------------------------------


def corpus(count=40):
    rng = np.random.default_rng(0)
    return store.from_documents(
        [np.append(rng.integers(FIRST, 200, n), END) for n in rng.integers(3, 40, count)]
    )


TEXT = f"untie_the_knots:end_id={END},knot_ids=(1,2,3,4),weights=(0.5,0.5)"


def test_rows_of_a_plan_are_transformed_by_their_number_on_any_number_of_processes():
    knots = parse_transforms(TEXT, vocab_size=200)
    plain = Loader([corpus()], parse_plan("concat"), length=64, rows=4, seed=3)
    tied = Loader([corpus()], parse_plan("concat"), length=64, rows=4, seed=3, transforms=knots)
    changed = 0
    for step in (0, 1, 2):
        one, other = plain.batch(step), tied.batch(step)
        for row in range(4):
            count = int(one["weights"][row].sum())  # one row is not full
            given_row = np.append(one["tokens"][row, :count], one["targets"][row, count - 1])
            (made,) = knots[0]({"tokens": given_row}, (3, 4 * step + row, 0, 0))
            np.testing.assert_array_equal(other["tokens"][row, :count], made["tokens"][:-1])
            np.testing.assert_array_equal(other["targets"][row, :count], made["tokens"][1:])
            np.testing.assert_array_equal(other["weights"][row, :count], made["weights"][1:])
            assert not other["weights"][row, count:].any()
            changed += bool((made["tokens"] != given_row).any())
        for process in (0, 1):
            share = tied.batch(step, process=process, processes=2)
            for name, array in share.items():
                half = other[name][2 * process : 2 * process + 2]
                np.testing.assert_array_equal(array, half)
    assert 0 < changed < 12


def test_of_a_row_with_padding_only_the_tokens_are_transformed():
    knots = parse_transforms(f"{TEXT},per_sequence", vocab_size=200)
    loaded = Loader([corpus(5)], parse_plan("concat"), length=64, rows=2, seed=0, transforms=knots)
    for step in range(int(np.ceil(loaded.schedule.steps))):
        batch = loaded.batch(step)
        filled = (batch["tokens"] > 0) | (batch["targets"] > 0)
        weights = batch["weights"].sum(1)
        assert np.isclose(weights[filled.any(1)], 1).all()
        assert not batch["weights"][~filled].any()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("untie_the_knots:end_id=0,knot_ids=(1,2)", r"2 knot tokens for .* up to 3 chunks; give 4"),
        ("untie_the_knots:end_id=1,knot_ids=(1,2,3,4)", r"a token is given twice"),
        (TEXT.replace("0.5,0.5", "0,0"), r"give one for each, not all 0"),
        (TEXT.replace("0.5,0.5", "1"), r"weights=\(1.0,\) of 2 laws"),
        (
            TEXT.replace("(1,2,3,4)", "(1,2,3,300)"),
            r"the token 300, which the vocabulary of 200 to",
        ),
        ("untie:end_id=0", r"no transform is called 'untie'; use untie_the_knots, per_seq"),
        ("per_sequence:x=1", r"per_sequence has no field 'x'"),
    ],
)
def test_transforms_that_cannot_be_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_transforms(text, vocab_size=200)


def test_rows_whose_documents_are_kept_apart_are_refused_before_training():
    knots = parse_transforms(TEXT, vocab_size=200)
    with pytest.raises(InputError, match="keeps them apart; choose a plan that joins them"):
        Loader([corpus()], parse_plan("best_fit"), length=64, rows=4, seed=0, transforms=knots)
    fill = transforms.FillInTheMiddle(1, 2, 3, rate=1.0)
    with pytest.raises(InputError, match="make 68 tokens of a row of 65; give transforms that k"):
        Loader([corpus()], parse_plan("concat"), length=64, rows=4, seed=0, transforms=[fill])


@pytest.mark.parametrize("mark", [KNOTS[1], OPEN, CLOSE_LIST])
def test_a_text_that_holds_a_reserved_token_is_refused(mark):
    tokens = sequence([4, 3])
    tokens[2] = mark
    message = rf"holds the token {mark}, at place 2 of a row, .*; reserve tokens that no text holds"
    with pytest.raises(InputError, match=message):
        TRACED({"tokens": tokens}, (0, 0))
    # Of a store the first batch is looked at before a run begins.
    knots = parse_transforms(TEXT, vocab_size=200)
    texts = store.from_documents([np.array([FIRST, KNOTS[3], END])] * 40)
    with pytest.raises(InputError, match=f"holds the token {KNOTS[3]}, at place "):
        Loader([texts], parse_plan("concat"), length=64, rows=1, seed=0, transforms=knots)
    # Characters of ids are letters, which texts are made of.
    tokens[2] = LETTERS[0]
    assert TRACED({"tokens": tokens}, (0, 0))


@pytest.mark.parametrize("sample", [ALWAYS, TRACED.backtracing], ids=lambda s: type(s).__name__)
def test_numbers_outside_their_range_are_refused_by_field(sample):
    assert stated_ranges.without_range(type(sample)) == []
    for field, value in stated_ranges.outside(type(sample)):
        with pytest.raises(InputError, match=rf"^{type(sample).__name__}\.{field} is .*; give "):
            dataclasses.replace(sample, **{field: value})


def test_backtracing_is_written_inside_the_transform():
    text = TEXT + (
        ",backtracing=(Backtracing:open_id=5,close_id=6,open_list_id=7,separator_id=8,"
        "close_list_id=9,characters=(10,11,12))"
    )
    parsed = parse_choice(text, loader.TRANSFORMS)
    assert parsed.backtracing == Backtracing(*HEADS, (10, 11, 12))
    assert set(parsed.token_ids) == {*KNOTS, *HEADS, 10, 11, 12}
