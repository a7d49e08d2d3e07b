"""Rows of new tokens against what the paper says of each of them, written out by hand."""

import dataclasses
import itertools
import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lminf import cli
from lminf.data import bpe
from lminf.data.tokenizers import ByteTokenizer, Tokenizer
from lminf.errors import InputError
from lminf.lm.expand_vocab import expand_vocab, new_rows
from lminf.lm.lm import LM
from lminf.models import spec
from lminf.surgery import vocab_map
from tests.models import specs

LATIN = ["".join(word) for word in itertools.product(
    ("ba", "de", "mo", "tri", "sal"), ("n", "ra", "tok", "vi"), ("", "s", "eme"))]  # fmt: skip
GREEK = ["".join(word) for word in itertools.product(
    ("κα", "λο", "μι", "τρε", "συ"), ("ν", "ρα", "τοκ", "βι"), ("", "ς", "εμε"))]  # fmt: skip


def text_of(words, count, seed):
    drawn = random.Random(seed)
    return " ".join(drawn.choice(words) for _ in range(count))


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    size = 300
    return bpe.cut(bpe.train([text_of(LATIN, 3000, 0)], size), size)


@pytest.fixture(scope="module")
def greek():
    return [text_of(GREEK, 40, seed) for seed in range(1, 30)]


@pytest.fixture(scope="module")
def new(old, greek):
    return bpe.extend(old, greek, 40)


def lm_of(tokenizer, **changes):
    shape = spec.llama(vocab_size=tokenizer.vocab_size + 4, width=16, num_layers=2, num_heads=2,
                       num_kv_heads=1, hidden_dim=24, trained_length=64, **changes)  # fmt: skip
    return LM(shape, specs.parameters(shape), tokenizer)


# --- The tokenizer --------------------------------------------------------------------------------


def test_old_tokens_keep_their_ids_and_texts_come_back(old, new, greek):
    before, after = (t.backend.get_vocab(with_added_tokens=True) for t in (old, new))
    assert before.items() <= after.items()
    assert sorted(set(after.values()) - set(before.values())) == list(range(300, 340))
    for text in [*greek[:3], text_of(LATIN, 50, 9), "Ω mixed with ban, λοτοκ… 漢 🙂\n"]:
        assert new.decode(new.encode(text)) == text
        assert len(new.encode(text)) <= len(old.encode(text))
    assert len(new.encode(greek[0])) < 0.5 * len(old.encode(greek[0]))
    # What the text has nothing of is split as before.
    latin = text_of(LATIN, 200, 5)
    assert new.encode(latin).tolist() == old.encode(latin).tolist()


def test_tokens_come_in_the_order_of_their_merges(old, greek, new):
    few = bpe.extend(old, greek, 10)
    assert few.token_bytes == new.token_bytes[:310]


def test_too_few_new_tokens_are_refused_with_their_number(old):
    with pytest.raises(
        InputError, match=r"gives (\d+) tokens .* not the 500 that a vocab"
    ) as refusal:
        bpe.extend(old, [text_of(GREEK[:2], 50, 0)], 500)
    least = int(str(refusal.value).split(" gives ")[1].split()[0])
    assert bpe.extend(old, [text_of(GREEK[:2], 50, 0)], least).vocab_size == 300 + least


def test_bytes_that_the_texts_do_not_hold_get_no_token(greek):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False)  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator([text_of(LATIN, 300, 0)], trainer)
    lacking = Tokenizer(backend, {}, False, (), None)  # most bytes, as SmolLM2's lacks 21
    added = bpe.extend(lacking, greek, 40).token_bytes[lacking.vocab_size :]
    assert len(added) == 40
    assert all(token in "\n".join(greek).encode() for token in added)


def test_the_number_that_a_refusal_advises_works(old):
    texts = [text_of(GREEK[:2], 50, 0)]
    with pytest.raises(
        InputError, match=r"a vocabulary of \d+ takes: .*--tokens=\d+ or fewer"
    ) as refusal:
        expand_vocab(lm_of(old), texts, tokens=500, rows="mean", seed=0)
    advised = int(re.search(r"--tokens=(\d+)", str(refusal.value))[1])
    expanded = expand_vocab(lm_of(old), texts, tokens=advised, rows="mean", seed=0)
    assert expanded.spec.vocab_size % 8 == 0


def test_a_text_without_new_tokens_is_refused(old):
    with pytest.raises(InputError, match=r"gives 0 tokens .* give more text$"):
        bpe.extend(old, ["x"], 1)


def test_a_negative_seed_is_refused():
    words = ["expand-vocab", "m", "--text=x", "--tokens=8", "--out=y"]
    with pytest.raises(InputError, match="-1 is no seed"):
        cli.parse([*words, "--seed=-1"])


# --- Rows -----------------------------------------------------------------------------------------


def test_mean_is_the_mean_of_the_rows_that_spell_the_token(old, new):
    rows = new_rows(old, new, [], "mean")
    table = np.random.default_rng(0).normal(size=(304, 8)).astype(np.float32)
    mapping = vocab_map.vocab_map(rows, old_tokens=300, old_rows=304)
    expanded = np.asarray(mapping.table(jnp.asarray(table), seed=0))
    assert expanded.shape == (340, 8)
    np.testing.assert_array_equal(expanded[:300], table[:300])
    whole = 0
    for index, spelled in enumerate(new.token_bytes[300:], 300):
        assert abs(sum(rows[index - 300].values()) - 1) < 1e-12
        try:
            text = spelled.decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        np.testing.assert_allclose(expanded[index], table[old.encode(text)].mean(0), atol=1e-6)
        whole += 1
    assert whole > 20


def test_merge_halves_the_parts_of_a_pair():
    # 3 = (0, 1), 4 = (3, 2), and 5 in two ways: (4, 0) and (1, 2); 6 is made of what nothing makes.
    merges = [(0, 1, 3), (3, 2, 4), (4, 0, 5), (1, 2, 5), (7, 0, 6)]
    rows = vocab_map.merge_rows(merges, old_tokens=3, count=5)
    assert rows[:2] == [{0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25, 2: 0.5}]
    of_5 = {0: (0.125 + 0.5) / 2, 1: (0.125 + 0.5) / 2, 2: (0.25 + 0.5) / 2}
    assert rows[2] == pytest.approx(of_5)
    assert rows[3:] == [{}, {}]


def test_align_averages_over_occurrences_and_not_over_documents():
    counts = {2: {(0,): 3, (0, 1, 1): 1}}
    (row, other) = vocab_map.align_rows(counts, [{}, {1: 1.0}], old_tokens=2)
    assert row == pytest.approx({0: 0.75 + 0.25 / 3, 1: 0.25 * 2 / 3})
    assert other == {1: 1.0}


def test_an_occurrence_takes_the_old_tokens_among_its_bytes_or_around_it(old, new, greek):
    counts = bpe.aligned(old, new, greek)
    ids, ends = new.encode_with_bytes(greek[0])
    data = greek[0].encode()
    for place in range(5, 25):
        if ids[place] < 300:
            continue
        spelled = data[ends[place - 1] : ends[place]]
        sources = [b"".join(old.token_bytes[i] for i in source) for source in counts[ids[place]]]
        assert any(source in spelled or spelled in source for source in sources)
        assert any(source == spelled for source in sources)  # Greek is old bytes
    # A token inside an old one: "ban" is one old token, and "an" would be new.
    outer = old.backend.get_vocab()
    assert max(len(token) for token in outer) > 2


def test_a_corpus_twice_over_aligns_as_once(old, new, greek):
    once, twice = (new_rows(old, new, texts, "align") for texts in (greek, greek * 2))
    for first, second in zip(once, twice, strict=True):
        assert first == pytest.approx(second)


def test_where_each_token_always_replaces_the_same_tokens_align_is_mean(old, new, greek):
    counts = bpe.aligned(old, new, greek)
    rows = dict(zip(range(300, 340), zip(*(new_rows(old, new, greek, kind)
                                           for kind in ("align", "mean")), strict=True),
                    strict=True))  # fmt: skip
    one_to_one = [token for token, sources in counts.items() if len(sources) == 1]
    assert len(one_to_one) > 10
    for token in one_to_one:
        align, mean = rows[token]
        assert align == pytest.approx(mean)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """By trying every support: on it, all scores are lowered by as much."""
    for scores in np.random.default_rng(0).normal(size=(20, 4)):
        points = []
        for size in range(1, 5):
            for support in map(list, itertools.combinations(range(4), size)):
                point = np.zeros(4)
                point[support] = scores[support] - (scores[support].sum() - 1) / size
                points.append(point)
        inside = [point for point in points if point.min() >= 0]
        nearest = min(inside, key=lambda point: ((point - scores) ** 2).sum())
        np.testing.assert_allclose(vocab_map.sparsemax(scores[None])[0], nearest, atol=1e-12)


def test_focus_weighs_old_tokens_by_their_likeness():
    # Old tokens 0 to 2, of which 2 has no vector; cosines of 3 with 0 and 1 are 1 and 1/2.
    vectors = np.array([[2.0, 0], [0.5, 0.75**0.5], [0, 0], [3, 0], [0, 0], [-1, 0]])
    likely, unknown, opposite = vocab_map.focus_rows(vectors, old_tokens=3)
    assert likely == pytest.approx({0: 0.75, 1: 0.25})
    assert unknown == {}
    assert opposite == pytest.approx({1: 0.75, 0: 0.25})  # cosines -1 and -1/2
    assert vocab_map.focus_rows(vectors[2:], old_tokens=1) == [{}, {}, {}]


def test_focus_takes_old_tokens_of_the_texts_and_leaves_rare_ones_unknown(old, new, greek):
    rows = new_rows(old, new, greek, "focus")
    counts = np.bincount(np.concatenate([new.encode(text) for text in greek]), minlength=340)
    assert [bool(row) for row in rows] == (counts[300:] >= 10).tolist()
    assert 5 < sum(map(bool, rows)) < 40
    for row in filter(None, rows):
        assert sum(row.values()) == pytest.approx(1)
        assert min(counts[token] for token in row) >= 10


def test_unknown_rows_have_the_spread_of_the_table_in_every_channel():
    table = np.random.default_rng(1).normal([0.0, 3.0], [1.0, 0.1], (4000, 2)).astype(np.float32)
    mapping = vocab_map.vocab_map([{}] * 4000, old_tokens=4000, old_rows=4000)
    drawn = np.asarray(mapping.table(jnp.asarray(table), seed=0))[4000:]
    np.testing.assert_allclose(drawn.mean(0), table.mean(0), atol=0.06)
    np.testing.assert_allclose(drawn.std(0), table.std(0), rtol=0.06)


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["random", "mean", "merge", "align"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_old_tokens_stay_to_the_bit(old, greek, rows, tied):
    lm = lm_of(old, tied=tied)
    expanded = expand_vocab(lm, greek, tokens=24, rows=rows, seed=0)
    assert expanded.spec.vocab_size == 328  # 324 up to a multiple of 8
    assert expanded.tokenizer.vocab_size == 328  # every row has a token
    prompt = text_of(LATIN, 8, 3)
    before, after = (model.next([prompt])[0] for model in (lm, expanded))
    # Of log probabilities, the differences between tokens are those of logits.
    np.testing.assert_allclose(before[:300] - before[0], after[:300] - after[0], atol=2e-6)
    for name in ("embed",) if tied else ("embed", "head"):
        np.testing.assert_array_equal(lm.params[name][:300], expanded.params[name][:300])


def test_equal_tables_stay_equal(old, greek):
    lm = lm_of(old, tied=False)
    lm = dataclasses.replace(lm, params={**lm.params, "head": lm.params["embed"]})
    expanded = expand_vocab(lm, greek, tokens=24, rows="random", seed=3)
    np.testing.assert_array_equal(expanded.params["embed"], expanded.params["head"])


def test_bad_input_is_one_sentence(old, greek):
    lm = lm_of(old)
    with pytest.raises(InputError, match="rows='men'"):
        expand_vocab(lm, greek, tokens=8, rows="men", seed=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="give at least one"):
        expand_vocab(lm, greek, tokens=0, rows="mean", seed=0)
    with pytest.raises(InputError, match="has 10 rows but the map is one of 304"):
        vocab_map.vocab_map([{}], old_tokens=300, old_rows=304).table(jnp.zeros((10, 2)), seed=0)


def test_special_tokens_beyond_the_vocabulary_keep_their_ids(greek):
    new = bpe.extend(ByteTokenizer(), greek, 16)
    assert new.bos_id == ByteTokenizer().bos_id == 256
    assert new.encode("<bos>").tolist() == list(b"<bos>")
    assert new.encode("<bos>", special="parse").tolist() == [256]
    assert new.decode(new.encode(greek[0])) == greek[0]
    assert len(new.encode(greek[0])) < len(greek[0].encode())
