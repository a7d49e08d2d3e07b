"""Plans: every token once an epoch, in documents as they were, on any number of processes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.data import loader, packing, plans, store
from lminf.data.decomposition import CURRICULA, Decomposition, cut
from lminf.data.loader import Loader, Prefetched, parse_plan
from lminf.data.permutation import shuffled, uniform
from lminf.data.plans import BestFit, Concat, Mixture, shares
from lminf.data.statistics import statistics
from lminf.errors import InputError

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=25).filter(lambda x: max(x) > 1)


def corpus(lengths):
    """A store whose tokens are all different, so that each can be followed."""
    ends = np.cumsum(lengths)
    return store.from_documents(np.split(np.arange(ends[-1]), ends[:-1]))


def used(loaded, steps):
    """Counter of (token, target) over the batches, with every row checked on the way."""
    found = Counter()
    for step in range(steps):
        batch = loaded.batch(step)
        real = batch["weights"] == 1
        assert np.isin(batch["weights"], (0, 1)).all()
        # All tokens differ, so "the token after it" is its number plus one.
        np.testing.assert_array_equal(batch["targets"][real], batch["tokens"][real] + 1)
        assert not batch["tokens"][~real].any()
        found.update(batch["tokens"][real].tolist())
    return found


def epoch(loaded):
    """Whole steps until an epoch of a schedule whose steps divide evenly is over."""
    assert loaded.schedule.steps == int(loaded.schedule.steps)
    return int(loaded.schedule.steps)


def inputs(lengths):
    """The tokens that have a successor in their document."""
    ends = np.cumsum(lengths)
    return set(range(ends[-1])) - set((ends - 1).tolist())


@given(st.integers(1, 300), st.integers(0, 3))
def test_a_shuffle_is_a_permutation(count, seed):
    found = shuffled(np.arange(count), count, seed=(seed, 1))
    assert sorted(found) == list(range(count))
    np.testing.assert_array_equal(
        found[::3], shuffled(np.arange(0, count, 3), count, seed=(seed, 1))
    )


def test_shuffles_are_the_same_on_every_machine_and_look_random():
    found = shuffled(np.arange(3), 10**12, seed=(0, 1))
    assert found.tolist() == [869656142823, 284458146545, 3100506582]
    found = shuffled(np.arange(100_000), 100_000, seed=3)
    # Where neighbours go is uncorrelated, and each tenth of places holds a tenth of indices.
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert np.abs(np.histogram(found[:10_000], 10, (0, 100_000))[0] - 1000).max() < 150
    u = uniform(np.arange(100_000, dtype=np.uint64), seed=1)
    assert abs(u.mean() - 0.5) < 0.005
    assert u.min() >= 0
    assert u.max() < 1


@settings(max_examples=20)
@given(LENGTHS, st.sampled_from([Concat("apart"), BestFit()]), st.integers(0, 2))
def test_plans_that_keep_documents_apart_use_each_token_once(lengths, plan, seed):
    loaded = Loader([corpus(lengths)], plan, length=16, rows=1, seed=seed)
    steps = epoch(loaded)
    for first in (0, 1):  # in every epoch
        found = Counter()
        for step in range(first * steps, (first + 1) * steps):
            batch = loaded.batch(step)
            real = batch["weights"] == 1
            found.update(batch["tokens"][real].tolist())
            np.testing.assert_array_equal(batch["targets"][real], batch["tokens"][real] + 1)
            _check_segments(batch, np.cumsum(lengths))
        assert found == Counter(inputs(lengths))


def _check_segments(batch, ends):
    """Each segment is a stretch of one document, or padding at the end, with positions from 0."""
    columns = [batch[name] for name in ("tokens", "segments", "positions", "weights")]
    for tokens, segments, positions, weights in zip(*columns, strict=True):
        last = segments.max()
        assert sorted(set(segments.tolist())) == list(range(1, last + 1))
        assert (np.diff(weights) <= 0).all()
        for segment in range(1, last + 1):
            at = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(np.diff(at), 1)
            np.testing.assert_array_equal(positions[at], np.arange(len(at)))
            if weights[at[0]]:
                assert weights[at].all()
                np.testing.assert_array_equal(np.diff(tokens[at]), 1)
                assert len(set(np.searchsorted(ends, tokens[at], side="right"))) == 1


@settings(max_examples=20)
@given(LENGTHS, st.integers(0, 2))
def test_concat_uses_every_token_but_the_last_once(lengths, seed):
    loaded = Loader([corpus(lengths)], Concat(), length=16, rows=1, seed=seed)
    assert used(loaded, epoch(loaded)) == Counter(range(sum(lengths) - 1))
    assert "segments" not in loaded.batch(0)


@given(LENGTHS)
def test_best_fit_cuts_no_document_that_fits_a_row(lengths):
    found = packing.BestFit(packing.documents(np.cumsum(lengths)), length=16)
    pieces = found.spans(np.arange(found.count))
    whole = dict(zip(pieces.start, pieces.size, strict=True))
    for start, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        if 1 < n <= 17:
            assert whole[start] == n - 1
        elif n > 17:
            assert whole[start] == 16


@given(st.lists(st.integers(1, 31), min_size=1, max_size=60))
def test_packing_is_best_fit_decreasing(sizes):
    """As many rows, equally full, as one piece after another gives."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, free in enumerate(rows) if free >= size]
        at = min(fitting, key=lambda i: rows[i], default=None)
        if at is None:
            rows.append(32 - size)
        else:
            rows[at] -= size
    groups = packing.pack(np.bincount(sizes, minlength=32), 32)
    free = [32 - sum(size * times for size, times in held) for held, bins in groups
            for _ in range(bins)]  # fmt: skip
    assert sorted(free) == sorted(rows)


@given(LENGTHS, st.sampled_from(["take", "draw"]), st.integers(0, 2))
def test_decomposition_cuts_prefixes_of_documents_into_powers_of_two(lengths, beyond, seed):
    ends = np.cumsum(lengths)
    found = cut(packing.documents(ends), shortest=2, longest=4, beyond=beyond, seed=seed)
    of_document = {i: [] for i in range(len(lengths))}
    for k, starts in found.items():
        for start in starts:
            document = int(np.searchsorted(ends, start, side="right"))
            of_document[document].append((int(start), 2**k + 1))
    for document, n in enumerate(lengths):
        pieces = sorted(of_document[document])
        at = int(ends[document]) - n
        left = n
        for start, size in pieces:
            assert start == at
            if left - 1 < 2 * 16 or beyond == "take":
                assert size == 2 ** min(4, int(np.log2(left - 1))) + 1
            at, left = at + size, left - size
        assert 0 <= left < 2**2 + 1


@settings(max_examples=20)
@given(LENGTHS.filter(lambda x: max(x) > 8), st.integers(0, 2), st.integers(1, 3))
def test_decomposition_uses_each_token_of_its_rows_once(lengths, seed, cycles):
    plan = Decomposition(shortest=2, longest=4, cycles=cycles)
    loaded = Loader([corpus(lengths)], plan, length=16, rows=2, seed=seed)
    ends = np.cumsum(lengths)
    found = cut(packing.documents(ends), shortest=2, longest=4, beyond="take", seed=seed)
    expected = Counter(
        token
        for k, starts in found.items()
        for s in starts.tolist()
        for token in range(s, s + 2**k)
    )
    steps = epoch(loaded)
    assert used(loaded, steps) == expected
    for step in range(steps):
        batch = loaded.batch(step)
        assert batch["tokens"].size == 32  # constant tokens a step
        assert batch["tokens"].shape in loaded.schedule.shapes
        assert "segments" not in batch


LONG = [700 + 13 * i for i in range(40)]


def test_curricula_take_their_odds_without_replacement():
    """The first draws follow the odds; a cycle takes its part of every length."""
    assert CURRICULA["grow_linear"](6) == [6, 5, 4, 3, 2, 1]
    assert CURRICULA["grow_p2"](6) == [32, 16, 8, 4, 2, 1]
    assert CURRICULA["shrink_p100"](3) == [1, 100, 10_000]
    plan = Decomposition(shortest=3, longest=6, beyond="draw", tokens="equal", cycles=2,
                         curriculum="grow_p2")  # fmt: skip
    schedule = Loader([corpus(LONG)], plan, length=64, rows=1, seed=0).schedule
    assert len(set(schedule.batches)) == 1  # equal tokens are equal batches
    half = schedule.batches[0] // 2
    order, _ = schedule.epoch(0)
    cycles = order[: 4 * half], order[4 * half :]
    assert Counter(cycles[0].tolist()) == dict.fromkeys(range(4), half)
    for cycle in cycles:  # while all four are left, shares are 8:4:2:1
        some = Counter(cycle[:half].tolist())
        assert [some[i] / half for i in range(4)] == pytest.approx(
            np.array([8, 4, 2, 1]) / 15, abs=0.12
        )
    assert (schedule.epoch(1)[0] != order).any()


def test_the_trainers_weighting_agrees_where_lengths_have_equal_tokens():
    make = {
        by: Loader([corpus(LONG)], Decomposition(shortest=3, longest=6, tokens="equal", by=by),
                   length=64, rows=1, seed=0)
        for by in ("odds", "odds_and_batches")
    }  # fmt: skip
    first, second = (loaded.schedule.epoch(0)[0] for loaded in make.values())
    np.testing.assert_array_equal(first, second)


def test_an_epoch_that_takes_a_part_goes_on_with_the_rest():
    plan = Decomposition(shortest=3, longest=4, tokens=(16, 32), cycles=1)
    loaded = Loader([corpus([50, 50, 60])], plan, length=16, rows=1, seed=0)
    held = [taken.layout.count for taken in loaded.schedule.taken]
    assert [taken.rows for taken in loaded.schedule.taken] == [2, 2]
    long = [
        tuple(batch["tokens"][0])
        for batch in map(loaded.batch, range(3 * held[1]))
        if batch["tokens"].shape == (1, 16)
    ]
    assert len(set(long[: held[1]])) == held[1]


def test_average_context_is_the_published_one():
    """Equal tokens of 256 … 8192 see 1,344 tokens on average, rows of 8,192 about 4,096."""
    sizes = [2**k for k in range(8, 14)]
    lengths = [size + 1 for size in sizes for _ in range(8192 // size)]
    equal = Loader([corpus(lengths)], Decomposition(), length=8192, rows=1, seed=0)
    ends = np.cumsum(lengths)
    found = statistics(equal.schedule.taken, ends=ends)
    assert round(found.mean_context) == 1344
    assert (found.documents_cut, found.documents_left_out) == (0, 0)
    long = np.cumsum([8192 * 4 + 1])
    joined = Loader([corpus([8192 * 4 + 1])], Concat(), length=8192, rows=1, seed=0)
    assert statistics(joined.schedule.taken, ends=long).mean_context == 4095.5


def test_statistics_count_what_a_plan_does():
    lengths = [17, 5, 40, 1, 12]  # inputs 16, 4, 39 = 2 x 16 + 7, none, 11
    ends = np.cumsum(lengths)

    def of(plan):
        loaded = Loader([corpus(lengths)], plan, length=16, rows=1, seed=0)
        return statistics(loaded.schedule.taken, ends=ends)

    best = of(BestFit())
    # Rows: 16; 16; 16; 11 + 4; 7.
    assert (best.rows, best.tokens, best.fill) == (5, 70, 70 / 80)
    assert (best.documents_cut, best.documents_left_out) == (1, 1)
    assert best.mean_length == 70 / 6
    assert best.attention_pairs == 3 * 136 + 66 + 10 + 28
    assert best.predicted == 70 / 75
    joined = of(Concat())
    assert (joined.rows, joined.tokens, joined.documents_left_out) == (5, 74, 0)
    assert joined.attention_pairs == 4 * 136 + 55
    apart = of(Concat("apart"))
    assert (apart.rows, apart.tokens, apart.mean_length) == (5, 70, 70 / 7)


PLANS = [
    "windows",
    "concat",
    "concat:documents=apart",
    "best_fit",
    "decomposition:shortest=2,beyond=draw",
    "mixture:weights=(3,1)",
    "mixture:weights=(3,1),plan=best_fit",
]


def stores(plan):
    made = [corpus(LONG[:3]), corpus([9, 30, 200])]
    return made if plan.startswith("mixture") else made[:1]


@pytest.mark.parametrize("plan", PLANS)
def test_any_number_of_processes_makes_the_same_batches(plan):
    """Also when the number changes on the way, and whatever was asked for before."""
    whole = Loader(stores(plan), parse_plan(plan), length=16, rows=8, seed=5)
    for step, processes in ((0, 1), (1, 2), (7, 2), (130, 1), (131, 2)):
        fresh = Loader(stores(plan), parse_plan(plan), length=16, rows=8, seed=5)
        parts = [fresh.batch(step, process=i, processes=processes) for i in range(processes)]
        expected = whole.batch(step)
        assert set(expected) == set(parts[0])
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)
    other = Loader(stores(plan), parse_plan(plan), length=16, rows=8, seed=6)
    assert any((other.batch(s)["tokens"].shape != whole.batch(s)["tokens"].shape)
               or (other.batch(s)["tokens"] != whole.batch(s)["tokens"]).any()
               for s in range(3))  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_documents_of_a_step_are_those_its_tokens_come_from(plan):
    made = stores(plan)
    loaded = Loader(made, parse_plan(plan), length=16, rows=4, seed=0)
    firsts = np.cumsum([0, *(s.tokens for s in made)])
    ends = np.concatenate([s.ends + first for s, first in zip(made, firsts, strict=False)])
    for step in range(5):
        pieces = loaded.schedule.at(step)
        held = np.concatenate([np.arange(a, a + n) for a, n in zip(*pieces[3:], strict=True)])
        expected = np.unique(np.searchsorted(ends, held, side="right")).tolist()
        assert loaded.documents(step) == expected


def test_a_mixture_has_its_shares_and_uses_each_corpus_once_an_epoch(monkeypatch):
    monkeypatch.setattr(plans, "MIXED_ROWS", 160)
    first, second = corpus([16 * 30 + 1]), corpus([16 * 10 + 1])
    loaded = Loader([first, second], Mixture((3.0, 1.0)), length=16, rows=8, seed=0)
    period = [loaded.schedule.at(step) for step in range(160 // 8)]
    starts = np.concatenate([pieces.start for pieces in period])
    assert (starts >= first.tokens).mean() == 0.25
    # In the order in which they come, rows of each corpus go through it again and again.
    for rows, count in ((starts[starts < first.tokens], 30), (starts[starts >= first.tokens], 10)):
        share = Counter(rows.tolist())
        assert len(share) == count
        assert max(share.values()) - min(share.values()) <= 1
    assert loaded.schedule.steps == 5.0
    assert shares((0.2, 0.3, 0.5)) == [32, 48, 80]
    assert sum(shares((1.0, 1.0, 1.0))) == 160


def test_stores_one_after_another_are_one_corpus():
    apart = Loader([corpus([20, 30]), corpus([25])], BestFit(), length=16, rows=2, seed=0)
    lengths = [20, 30, 25]
    together = Loader([corpus(lengths)], BestFit(), length=16, rows=2, seed=0)
    for step in range(3):
        a, b = apart.schedule.at(step), together.schedule.at(step)
        np.testing.assert_array_equal(a[2:], b[2:])


def test_a_row_goes_on_from_one_store_into_the_next():
    lengths = [20, 30, 25]
    together = Loader([corpus(lengths)], Concat(), length=16, rows=2, seed=0)
    ends = np.cumsum(lengths)
    texts = np.split(np.arange(ends[-1]), ends[:-1])
    parts = [store.from_documents([text]) for text in texts]
    apart = Loader(parts, Concat(), length=16, rows=2, seed=0)
    for step in range(int(np.ceil(together.schedule.steps))):
        for name, array in together.batch(step).items():
            np.testing.assert_array_equal(apart.batch(step)[name], array)


def test_prefetched_batches_are_the_same_in_any_order():
    loaded = Loader([corpus(LONG)], Concat(), length=16, rows=4, seed=0)
    ahead = Prefetched(loaded)
    for step in (0, 1, 2, 9, 3, 3, 4):
        np.testing.assert_array_equal(ahead.batch(step)["tokens"], loaded.batch(step)["tokens"])
    assert ahead.documents(3) == loaded.documents(3)
    own = Prefetched(loaded, process=1, processes=2).batch(3)["tokens"]
    np.testing.assert_array_equal(own, loaded.batch(3)["tokens"][2:])


@pytest.mark.parametrize(
    ("plan", "lengths", "rows", "message"),
    [
        ("decomposition:shortest=8", [100], 16, r"no length; lower shortest"),
        ("decomposition:shortest=2,longest=5", [100], 1, r"do not divide into rows of 32"),
        ("decomposition:shortest=4", [5, 6], 2, r"no document has 17 tokens"),
        ("decomposition:shortest=3,tokens=(9,9,9)", [50], 1, r"3 numbers of tokens for 2 lengths"),
        ("decomposition:shortest=3,tokens=(0,99)", [50], 1, r"99 tokens in rows of 16.* gives 32"),
        ("decomposition:shortest=3,curriculum=(1,0)", [50], 1, r"Decomposition.curriculum is "),
        ("mixture:weights=(1,2)", [50], 1, r"2 weights for 1 corpora"),
        ("best_fit", [1, 1], 1, r"no two tokens in a document"),
        ("bestfit", [50], 1, r"no data plan is called 'bestfit'; did you mean 'best_fit'"),
    ],
)
def test_bad_plans_are_refused(plan, lengths, rows, message):
    with pytest.raises(InputError, match=message):
        Loader([corpus(lengths)], parse_plan(plan), length=16, rows=rows, seed=0)


def test_rows_that_do_not_divide_among_processes_are_refused():
    loaded = Loader([corpus(LONG)], Concat(), length=16, rows=3, seed=0)
    with pytest.raises(InputError, match=r"3 rows of 16 tokens does not divide among 2 processes"):
        loaded.batch(0, process=0, processes=2)


def test_weights_too_small_for_a_row_are_refused():
    with pytest.raises(InputError, match=r"less than one row of 16,384"):
        shares((1.0, 1e-9))
    with pytest.raises(InputError, match=r"are not positive"):
        shares((1.0, -1.0))


def test_every_plan_has_a_name():
    assert set(loader.PLANS) == {plan.partition(":")[0] for plan in PLANS}
