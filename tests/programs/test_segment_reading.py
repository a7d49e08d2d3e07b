"""Reading in segments: what is kept, in which order, and when nothing changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.attention import rope
from lminf.attention.policy import Full
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm.lm import LM
from lminf.programs import segment_reading
from lminf.programs.segment_reading import SegmentReading, Threshold, TopK
from tests.models import specs

NEW = 4
LONG = np.random.default_rng(0).integers(0, 256, 60).astype(np.int32)
HOW = SegmentReading(segment_len=8, question_len=5, head_len=3)


@pytest.fixture(scope="module")
def full(lm):
    """Trained at 32 tokens."""
    return lm.with_policy(Full())


@pytest.fixture
def surprised(monkeypatch):
    """Entropies are what the test says, in the order of the segments."""

    def say(values):
        monkeypatch.setattr(
            segment_reading, "entropies", lambda lm, prompts, last: np.array(values[: len(prompts)])
        )

    return say


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_segments_cover_the_text_and_overlap_as_asked(length, segment_len, data):
    overlap = data.draw(st.integers(0, segment_len - 1))
    spans = segment_reading.segments(length, segment_len, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(stop - start == segment_len for start, stop in spans[:-1])
    for (_, stop), (start, after) in itertools.pairwise(spans):
        assert stop - start == overlap
        assert after > stop  # every segment adds something


def test_nothing_to_read_has_no_segments():
    assert segment_reading.segments(0, 8) == []


@pytest.mark.slow
@pytest.mark.parametrize("select", [TopK(), TopK(1)])
def test_a_prompt_that_fits_as_one_segment_is_read_as_it_is(full, select, small_steps):
    prompt = LONG[:16]
    how = SegmentReading(segment_len=8, question_len=5, head_len=3, select=select)
    kept = segment_reading.key_context(full, prompt, how, max_new_tokens=NEW)
    np.testing.assert_array_equal(kept.tokens, prompt)
    plain = full.generate(prompt, max_new_tokens=NEW)
    assert segment_reading.generate(full, prompt, how, max_new_tokens=NEW) == plain


@pytest.mark.parametrize("overlap", [0, 3])
def test_all_segments_kept_are_the_prompt(full, overlap, surprised):
    surprised([3.0, 1.0, 2.0, 5.0, 4.0])
    how = SegmentReading(segment_len=8, question_len=5, head_len=3, overlap=overlap, select=TopK(9))
    kept = segment_reading.key_context(full, LONG[:28], how, max_new_tokens=NEW)
    assert kept.kept == tuple(range(len(kept.segments)))
    np.testing.assert_array_equal(kept.tokens, LONG[:28])


def test_the_surest_segments_that_fit_are_kept_in_the_order_of_the_text(full, surprised):
    surprised([3.0, 1.0, 2.0, 1.0, 4.0, 0.5, 9.0])  # 52 tokens of context: the last has 4
    kept = segment_reading.key_context(full, LONG, HOW, max_new_tokens=NEW)
    # 28 tokens of room for 3 + 5 and two segments of 8: the surest, and the earlier of two equals;
    # then the 4 tokens of the last segment still fit.
    assert kept.kept == (1, 5, 6)
    expected = [LONG[:3], LONG[11:19], LONG[43:51], LONG[51:55], LONG[55:]]
    np.testing.assert_array_equal(kept.tokens, np.concatenate(expected))
    for select, wanted in ((TopK(1), (5,)), (Threshold(0.7), (5,)), (Threshold(0.1), (5,))):
        how = SegmentReading(segment_len=8, question_len=5, head_len=3, select=select)
        found = segment_reading.key_context(full, LONG, how, max_new_tokens=NEW)
        assert found.kept == wanted


@pytest.fixture(scope="module")
def finds_digits():
    """A layer made by hand: "?" attends to digits, and what it saw follows it."""
    spec = specs.change(
        specs.shallow(specs.LLAMA, 1), vocab_size=257, num_heads=1, num_kv_heads=1, head_dim=16,
        encoding=rope.NoEncoding(), query_scale=1.0,
    )  # fmt: skip
    params = specs.parameters(spec)
    params = {**params, "embed": np.zeros((257, 16), np.float32)}
    params["head"], digits = params["embed"].copy(), np.arange(10)
    is_digit, asks, other = 10, 11, 12  # channels, after one for each digit
    params["embed"][:, other] = 1
    params["embed"][[*b"0123456789?"], other] = 0
    params["embed"][digits + ord("0"), digits] = 1
    params["embed"][digits + ord("0"), is_digit] = params["embed"][ord("?"), asks] = 1
    params["head"][digits + ord("0"), digits] = 4
    weights = {name: np.zeros((16, 16), np.float32) for name in ("wq", "wk", "wv", "wo")}
    weights["wq"][asks, 0] = weights["wk"][is_digit, 0] = 4
    weights["wv"][digits, digits] = weights["wo"][digits, digits] = 1
    layers = params["layers"]
    mlp = {name: np.zeros_like(x) for name, x in layers["mlp"].items()}
    attention = {n: x.reshape(layers["attention"][n].shape) for n, x in weights.items()}
    params["layers"] = {**layers, "mlp": mlp, "attention": attention}
    return LM(spec, params, ByteTokenizer())


@pytest.mark.slow
@pytest.mark.parametrize(("at", "digit"), [(3, "7"), (29, "0"), (50, "9")])
def test_a_planted_key_is_in_the_surest_segment_and_is_the_answer(finds_digits, at, digit):
    """Anywhere else the model, which sees no digit, holds all bytes for equally likely."""
    filler = "".join(map(chr, np.random.default_rng(1).integers(97, 123, 58)))
    prompt = "^" + filler[:at] + digit + filler[at:] + "?"
    how = SegmentReading(segment_len=12, question_len=1, head_len=1, select=TopK(1))
    kept = segment_reading.key_context(finds_digits, prompt, how, max_new_tokens=1)
    start, stop = kept.segments[kept.kept[0]]
    assert digit in prompt[start:stop]
    assert bytes(kept.tokens.tolist()).decode() == "^" + prompt[start:stop] + "?"
    without = np.delete(kept.entropies, kept.kept)
    np.testing.assert_allclose(without, np.log(257), rtol=1e-5)
    assert kept.entropies[kept.kept[0]] < 1
    answer = segment_reading.generate(finds_digits, prompt, how, max_new_tokens=1)
    assert answer == digit


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 5])
def test_entropies_do_not_depend_on_order_or_company(full, small_steps, monkeypatch, last):
    prompts = [LONG[:12], LONG[20:29], LONG[7:19]]
    alone = [segment_reading.entropies(full, [prompt], last=last)[0] for prompt in prompts]
    logits = full.logits(prompts[:1], last=last)[0].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(alone[0], -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    together = segment_reading.entropies(full, prompts[::-1], last=last)
    np.testing.assert_allclose(together[::-1], alone, rtol=1e-5)
    monkeypatch.setattr(segment_reading, "BATCH_TOKENS", 1)
    np.testing.assert_allclose(
        segment_reading.entropies(full, prompts, last=last), alone, rtol=1e-5
    )


@pytest.mark.slow
def test_logits_are_those_of_the_whole_text_and_come_in_the_order_of_prompts(full, small_steps):
    """24 tokens are two chunks; the last 18 places span both."""
    found = full.logits([LONG[:24], LONG[:18]], last=18)
    alone = full.logits([LONG[:24]], last=18)
    assert found.shape == (2, 18, 257)
    np.testing.assert_allclose(found[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(found[1, 6:], found[0, :12], atol=1e-5)
    losses = full.token_nll(LONG[:24])[6:]
    log_p = found[0] - np.log(np.exp(found[0].astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(-log_p[np.arange(17), LONG[7:24]], losses, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_len": 0}, "segment_len=0: give at least 1"),
        ({"overlap": 8}, "overlap=8 of segments of 8 tokens; give less"),
        ({"entropy_position": "first"}, "entropy_position='first'; give 'last' or 'mean'"),
        ({"segment_len": 40}, "take 48 tokens, but .* trained at 32 .* use segment_len<=20"),
        ({"head_len": 40}, "the prompt has 30 tokens but head_len=40 and question_len=5 take 45"),
        ({"head_len": 24}, "head and question take 29 tokens, but this model was trained at 32"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(full, fields, message):
    def read():
        how = SegmentReading(**{"segment_len": 8, "question_len": 5, "head_len": 3} | fields)
        segment_reading.key_context(full, LONG[:30], how, max_new_tokens=NEW)

    with pytest.raises(InputError, match=message):
        read()


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(InputError, match="count=0: give at least 1 segment"):
        TopK(0)


def test_logits_of_more_places_than_a_prompt_has_are_refused(full):
    assert isinstance(full, LM)
    with pytest.raises(InputError, match="last=13: give at least 1, and no more than the shortest"):
        full.logits([LONG[:12]], last=13)
