"""Speculative decoding: the tokens of plain decoding, whatever a draft proposes."""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from lminf.attention import rope
from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
from lminf.attention.policies.hip import HiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.longheads import LongHeads
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    PerLayer,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.errors import InputError
from lminf.lm import speculative
from lminf.lm.drafts import ModelDraft, PromptLookup
from lminf.lm.generate import GREEDY, generate_tokens
from lminf.lm.speculative import Proposal, Speculation

PROMPTS = ["Twenty bytes of text", "Seven b", "Eleven byte"]  # 20, 7 and 11 tokens
NEW = 24
POLICIES = {
    "window": Window(8),
    "lambda": Lambda(6, 3),
    "lm_infinite": LMInfinite(8, 2),
    "streaming": Streaming(5, 3),
    "rerope": ReRoPE(8),
    "leaky": LeakyReRoPE(8, 4),
    "self_extend": SelfExtend(8, 4),
    "per_head": PerHead((LMInfinite(7, 2), Streaming(4, 3))),
    "per_head_mixed": PerHead((Full(), LMInfinite(6, 3))),
    "snapkv": SnapKV(6, window=2, pooling=3),
    "think": ThinK(0.5, recent=4),
    "snapkv_and_window": PerLayer((SnapKV(6, window=2, pooling=3), LMInfinite(8, 2))),
}
SELECTING = {
    "topk": TopK(8, sinks=2, topk=3, from_layer=1),
    "infllm": InfLLM(window=8, sinks=2, topk=1, block=4, repr_topk=1, exec_block=8),
    "hip": HiP(topk=4, window=4, sinks=2, block=2, query_block=4, query_stride=2, refresh=2,
               dense_layers=1),
    "longheads": LongHeads(12, chunk=4),
    "h2o": H2O(12, sinks=2, recent=2, turn=4),
    "tova": TOVA(12, turn=4),
    "sirllm": SirLLM(12, sinks=2, recent=2, turn=4),
}  # fmt: skip


@dataclass(frozen=True)
class Guesses:
    """Proposes what will be written, but for tokens that it gets wrong, and sometimes less."""

    written: np.ndarray  # [B, new]
    right: float = 0.8

    def start(self, lm, prompts, **settings):
        del lm, settings
        self.lengths.extend(len(prompt) for prompt in prompts)
        return self

    lengths: list = dataclasses.field(default_factory=list)

    def propose(self, texts, k, *, key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).sum())
        tokens = np.full((len(texts), k), -1, np.int32)
        for row, (text, length) in enumerate(zip(texts, self.lengths, strict=True)):
            known = self.written[row, len(text) - length :][: rng.integers(0, k + 1)]
            wrong = rng.random(len(known)) > self.right
            tokens[row, : len(known)] = np.where(wrong, (known + 1) % 256, known)
        return Proposal(tokens)


def plain_tokens(lm, prompts, *, new=NEW):
    """[B, new] tokens."""
    encoded = lm.encode_prompts(prompts)
    stream = generate_tokens(
        lm, encoded, sampling=GREEDY, max_new_tokens=new, key=jax.random.key(0)
    )
    return np.stack(list(stream), 1)


def rounds_of(lm, prompts, draft, *, k=5, new=NEW, sampling=GREEDY, **settings):
    """The rounds, and the tokens of each row."""
    speculation = Speculation(draft, k, **settings)
    rounds = list(
        speculative.rounds(
            lm, lm.encode_prompts(prompts), speculation, sampling=sampling, max_new_tokens=new,
            key=jax.random.key(0),
        )
    )  # fmt: skip
    return rounds, [np.concatenate(row) for row in zip(*(r.tokens for r in rounds), strict=True)]


def test_greedy_tokens_are_those_of_plain_decoding_and_rows_go_at_their_own_pace(lm, small_steps):
    plain = plain_tokens(lm, PROMPTS)
    rounds, tokens = rounds_of(lm, PROMPTS, Guesses(plain))
    np.testing.assert_array_equal(tokens, plain)
    assert any(len({len(new) for new in each.tokens}) > 1 for each in rounds)
    assert sum(each.target_calls for each in rounds) < NEW - 5
    accepted = sum(each.accepted for each in rounds)
    assert 0.3 < accepted / sum(each.drafted for each in rounds) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_greedy_tokens_are_those_of_plain_decoding_under_every_policy(lm, name, small_steps):
    """Rings wrap around, and what is rejected has overwritten what stood there."""
    lm = dataclasses.replace(lm, policy=POLICIES[name])
    plain = plain_tokens(lm, PROMPTS)
    for right in (0.8, 0.3):
        _, tokens = rounds_of(lm, PROMPTS, Guesses(plain, right))
        np.testing.assert_array_equal(tokens, plain)


@pytest.mark.parametrize("name", SELECTING)
def test_policies_that_select_by_content_are_refused(lm, name):
    with pytest.raises(InputError, match=r"selects by what tokens hold.*leave the draft out, or"):
        rounds_of(lm.with_policy(SELECTING[name]), PROMPTS, PromptLookup())


def test_schedules_that_follow_the_length_are_refused(lm):
    with pytest.raises(InputError, match="DynamicNTK rotates keys anew with every token"):
        rounds_of(lm.with_scaling(rope.DynamicNTK(2.0, 16)), PROMPTS, PromptLookup())


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [1e3, 3e5])
def test_tokens_within_rounding_are_read_as_plain_decoding_does(
    lm, rounding, small_steps, monkeypatch
):
    """Some tokens, and all, are taken for as good as equal to others."""
    jax.clear_caches()
    monkeypatch.setattr(speculative, "ROUNDING", rounding)
    plain = plain_tokens(lm, PROMPTS)
    rounds, tokens = rounds_of(lm, PROMPTS, Guesses(plain))
    jax.clear_caches()
    np.testing.assert_array_equal(tokens, plain)
    calls = sum(each.target_calls for each in rounds)
    # Each token is read again at most once, and beside that there is a call a round.
    assert len(rounds) < calls <= NEW - 1 + len(rounds) - 1
    if rounding > 1e5:
        assert sum(each.accepted for each in rounds) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm_infinite", "infllm", "hip", "longheads", "snapkv"])
def test_models_that_see_less_draft_for_full_attention(lm, name, small_steps):
    full, policy = lm.with_policy(Full()), (POLICIES | SELECTING)[name]
    plain = plain_tokens(full, PROMPTS)
    rounds, tokens = rounds_of(full, PROMPTS, ModelDraft(lm.with_policy(policy)))
    np.testing.assert_array_equal(tokens, plain)
    assert sum(each.target_calls for each in rounds) < NEW - 3
