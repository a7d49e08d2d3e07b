"""Prompts that begin alike: answers are those of each alone, and what is shared is read once."""

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention.policies.eviction import SirLLM
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import Full, LMInfinite
from lminf.errors import InputError
from lminf.lm import generate, layerwise, prefix
from lminf.lm.prefix import SharedPrefix
from lminf.lm.protocol import Score
from lminf.models import heads

BOOK = "It was the best of times, it was the worst of times, it was the age of wisdom."  # 78 bytes
# Two leave the trunk at one place, one leaves it later, one is shorter, one begins otherwise.
PROMPTS = [
    BOOK + " Who?",
    BOOK[:40] + "?" + BOOK[40:] + " Why",
    BOOK[:40] + "!" + BOOK[40:] + " How",
    BOOK[:70] + "Where is what?",
    BOOK + "?",
    "?" + BOOK + " But",
]
NEW = 6


@pytest.fixture
def chunks_read(monkeypatch):
    """Rows of every chunk that is read."""
    found, advance = [], generate.decode_step

    def counted(lm, tokens, *rest):
        if tokens.shape[1] > 1:
            found.append(len(tokens))
        return advance(lm, tokens, *rest)

    monkeypatch.setattr(generate, "decode_step", counted)
    return found


@pytest.mark.parametrize(
    "policy",
    [
        None,  # the fixture's own, one layer that forgets and one that does not
        pytest.param(LMInfinite(8, 2), marks=pytest.mark.slow),
        pytest.param(InfLLM(8, 2, topk=2, block=4, exec_block=8), marks=pytest.mark.slow),
        pytest.param(SirLLM(32, recent=8, turn=16), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_answer_is_that_of_the_prompt_alone(lm, small_steps, policy, rows):
    lm = lm if policy is None else lm.with_policy(policy)
    alone = [lm.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert SharedPrefix(lm, rows).generate(PROMPTS, max_new_tokens=NEW) == alone


def test_what_prompts_share_is_read_once(lm, small_steps, chunks_read):
    first, *twins = PROMPTS[:3]
    assert [len(prompt) for prompt in (first, *twins)] == [83, 83, 83]  # six chunks, padded by 13
    answers = {}
    texts = SharedPrefix(lm, rows=2).generate(
        twins, max_new_tokens=2, on_answer=answers.__setitem__
    )
    assert chunks_read == [1, 1, 1, 2, 2, 2]
    assert [answers[0], answers[1]] == texts
    chunks_read.clear()
    SharedPrefix(lm, rows=1).generate([first, *twins], max_new_tokens=2)
    assert chunks_read == [1] * (3 + 3 + 3 + 3)


def test_prompts_that_share_nothing_are_read_side_by_side(lm, small_steps, chunks_read):
    prompts = [f"{n}{BOOK[:20]}" for n in range(3)]  # two chunks each
    texts = SharedPrefix(lm, rows=2).generate(prompts, max_new_tokens=2)
    assert chunks_read == [2, 2, 1, 1]
    assert texts == [lm.generate(prompt, max_new_tokens=2) for prompt in prompts]


def test_the_trunk_is_what_agrees_longest_with_the_others():
    letters = [np.frombuffer(text.encode(), np.uint8) for text in ("aabb", "aabc", "aacc", "dddd")]
    tokens = np.stack(letters)
    chunks = [(tokens[:, i : i + 1], np.zeros((4, 1))) for i in range(4)]
    assert prefix.common_chunks(chunks).tolist() == [
        [3, 3, 2, 0], [3, 3, 2, 0], [2, 2, 3, 0], [0, 0, 0, 3],
    ]  # fmt: skip


def test_prompts_that_cannot_be_are_refused(lm):
    with pytest.raises(InputError, match="a prompt has no tokens; give at least one"):
        SharedPrefix(lm).generate([], max_new_tokens=3)
    with pytest.raises(InputError, match="max_new_tokens=0: give at least 1"):
        SharedPrefix(lm).generate(["abc"], max_new_tokens=0)


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(8, 2),
        pytest.param(None, marks=pytest.mark.slow),  # the fixture's own
        pytest.param(InfLLM(8, 2, topk=2, block=4, exec_block=8), marks=pytest.mark.slow),
        pytest.param(SirLLM(32, recent=8, turn=16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_follows_a_prefix_is_as_likely_as_in_one_text(lm, small_steps, policy):
    lm = lm if policy is None else lm.with_policy(policy)
    book = np.asarray(lm.tokenizer.encode(BOOK), np.int32)
    before = book[:64]
    tails = np.stack([book[start : start + 8] for start in (0, 20, 60)])
    first, second = prefix.log_probs_after(
        lm, before, [prefix.Tails(tails, 3), prefix.Tails(tails[:1, :5], 1)]
    )
    for tail, found in zip(tails, first, strict=True):
        text = np.concatenate([before, tail])
        positions = np.arange(len(text), dtype=np.int32)[None]
        # One call, and one row without padding. Evicting policies read no more than a turn.
        if getattr(lm.policy, "evict_every", None):
            logits = lm.logits([text], last=3)[0]
        else:
            hidden, _ = lm.forward(text[None], positions, lm.init_caches(batch=1, capacity=128))
            logits = np.asarray(heads.lm(lm.spec, lm.params, hidden))[0, -3:]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(found, expected, atol=2e-4)
    assert second.shape == (1, 1, lm.spec.vocab_size)
    np.testing.assert_allclose(np.exp(second).sum(-1), 1, atol=1e-4)


@pytest.mark.parametrize("policy", [SnapKV(40, window=8), ThinK(0.5, recent=8)], ids=str)
def test_a_prefix_is_the_prompt_of_a_policy_that_needs_one(lm, small_steps, policy):
    book = np.asarray(lm.tokenizer.encode(BOOK), np.int32)
    tail, ways = book[64:72], {}
    for name, of in {"compressed": policy, "full": Full()}.items():
        model = lm.with_policy(of)
        (found,) = prefix.log_probs_after(model, book[:64], [prefix.Tails(tail[None], 8)])
        ways[name] = -found[0, np.arange(7), tail[1:]]
        prompt = 64 if of.needs_prompt else None
        losses = model.token_nll(book[:72], prompt=prompt)
        np.testing.assert_allclose(ways[name], losses[64:], atol=2e-4)
    assert np.abs(ways["compressed"] - ways["full"]).max() > 1e-3  # it would be a row of its base


def test_a_prefix_ends_where_the_policy_evicts(lm, small_steps):
    lm = lm.with_policy(SirLLM(32, recent=8, turn=16))
    tails = [prefix.Tails(np.zeros((1, 4), np.int32), 1)]
    with pytest.raises(InputError, match="evicts every 16 tokens, and a prefix of 70 ends between"):
        list(prefix.log_probs_after(lm, np.zeros(70, np.int32), tails))


def as_written(lm, prompt, end):
    """The score of the bytes of an end that are read one by one, as the last one of a prompt is,
    after the others in one call.
    """
    ids = np.asarray(lm.tokenizer.encode(prompt + end), np.int32)
    start, caches, states = len(ids) - len(end), lm.init_caches(batch=1, capacity=256), []
    for first, last in [(0, start - 1), *((at, at + 1) for at in range(start - 1, len(ids) - 1))]:
        positions = np.arange(first, last, dtype=np.int32)[None]
        hidden, caches = lm.forward(ids[None, first:last], positions, caches)
        states.append(hidden[:, -1])
    logits = np.asarray(heads.lm(lm.spec, lm.params, jnp.stack(states[1:], axis=1)))[0]
    return Score.of(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), ids[start:])


ENDS = [" Who?", " Why not him", " It", " Who goes there, at this time of the night?"]


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(8, 2),
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(InfLLM(8, 2, topk=2, block=4, exec_block=8), marks=pytest.mark.slow),
        pytest.param(SirLLM(32, recent=8, turn=16), marks=pytest.mark.slow),
        pytest.param(TopK(8, 2, topk=2), marks=pytest.mark.slow),
        pytest.param(SnapKV(32, window=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_score_is_that_of_the_text_alone(lm, small_steps, policy):
    lm = lm if policy is None else lm.with_policy(policy)
    prompts = [BOOK] * 2 + ["A tale: " + BOOK[:20]] + [BOOK] * 2
    ends = [*ENDS[:2], ENDS[0], *ENDS[2:]]
    alone = [lm.score([prompt], [end])[0] for prompt, end in zip(prompts, ends, strict=True)]
    if isinstance(policy, InfLLM):  # its groups do not end with a chunk that is filled up
        alone = [as_written(lm, *pair) for pair in zip(prompts, ends, strict=True)]
    for found, expected in zip(SharedPrefix(lm).score(prompts, ends), alone, strict=True):
        assert found.log_prob == pytest.approx(expected.log_prob, abs=5e-4)
        assert found[1:] == expected[1:]


def test_the_prompt_of_several_continuations_is_read_once(lm, small_steps, monkeypatch):
    tokens, forward = [], layerwise.LayerwiseDecoder.__call__

    def counted(self, ids, *rest):
        tokens.append(ids.size)
        return forward(self, ids, *rest)

    monkeypatch.setattr(layerwise.LayerwiseDecoder, "__call__", counted)
    lm = lm.with_policy(LMInfinite(8, 2))
    SharedPrefix(lm).score([BOOK] * 4, ENDS)
    # The book in five chunks, of which the first is filled up; the longest end has 43 bytes.
    assert sum(tokens) == 5 * 16 + 4 * 48


def test_a_text_is_read_once_for_all_questions_about_it(lm, small_steps, monkeypatch):
    tokens, forward = [], layerwise.LayerwiseDecoder.__call__

    def counted(self, ids, *rest):
        tokens.append(ids.size)
        return forward(self, ids, *rest)

    text, questions, ends = BOOK * 4, [" Who?", " Why?", " Who?"], [" He", " So", " I"]
    prompts = [text + question for question in questions]
    lm = lm.with_policy(LMInfinite(8, 2))
    alone = [lm.score([prompt], [end])[0] for prompt, end in zip(prompts, ends, strict=True)]
    monkeypatch.setattr(layerwise.LayerwiseDecoder, "__call__", counted)
    together = SharedPrefix(lm).score(prompts, ends)
    assert sum(tokens) < 2 * len(text)
    for found, expected in zip(together, alone, strict=True):
        assert found.log_prob == pytest.approx(expected.log_prob, abs=5e-4)
    tokens.clear()
    SharedPrefix(lm).score([text + BOOK[:40], text + BOOK[40:]], ends[:2])
    assert sum(tokens) > 2 * len(text)  # they differ by more than is read again for nothing


def test_options_that_differ_in_their_last_token_are_read_as_one(lm, small_steps, monkeypatch):
    rows, forward = [], layerwise.LayerwiseDecoder.__call__

    def counted(self, ids, *rest):
        rows.append(len(ids))
        return forward(self, ids, *rest)

    lm = lm.with_policy(LMInfinite(8, 2))
    alone = [lm.score([BOOK], [end])[0] for end in (" A", " B", " Cat")]
    monkeypatch.setattr(layerwise.LayerwiseDecoder, "__call__", counted)
    found = SharedPrefix(lm).score([BOOK] * 3, [" A", " B", " Cat"])
    assert max(rows) == 2  # of " A" and " B", and of " Cat"
    for one, expected in zip(found, alone, strict=True):
        assert one.log_prob == pytest.approx(expected.log_prob, abs=5e-4)


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(8, 2),
        pytest.param(SirLLM(32, recent=8, turn=16), marks=pytest.mark.slow),
        pytest.param(TopK(8, 2, topk=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_follows_prompts_that_begin_alike_is_what_follows_each(lm, small_steps, policy):
    shared = SharedPrefix(lm.with_policy(policy))
    prompts = [BOOK + end for end in ENDS]
    assert shared.next(prompts) == pytest.approx(
        np.concatenate([shared.lm.next([prompt]) for prompt in prompts]), abs=5e-4
    )
    others = ["Once", BOOK, "A"]  # that share nothing
    assert shared.next(others) == pytest.approx(shared.lm.next(others), abs=5e-4)
