"""Policies that evict by a score, in a model: reading, writing, and what SirLLM is told."""

import dataclasses

import jax
import numpy as np
import pytest

from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
from lminf.attention.policy import Full, PerLayer
from lminf.errors import InputError
from tests.cases import compilations

TEXT = "Straße: forty-one tokens, a few in bytes"
PROMPTS = ["Twenty bytes of text", "Seven b", "Eleven byte"]
SIRLLM = SirLLM(12, sinks=2, recent=2, turn=4, decay=0.9)


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer.encode(TEXT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        SIRLLM,
        dataclasses.replace(SIRLLM, score="reference"),
        H2O(12, sinks=2, recent=2, turn=4),
        PerLayer((TOVA(12, turn=4), Full())),
    ],
)
def test_losses_do_not_depend_on_the_chunks_within_a_turn(lm, ids, policy, monkeypatch):
    """16 tokens at a time are four turns; 2 are half of one."""
    evicting = lm.with_policy(policy)
    whole = evicting.token_nll(ids)
    monkeypatch.setattr("lminf.lm.nll.CHUNK", 2)
    np.testing.assert_allclose(evicting.token_nll(ids), whole, atol=1e-5)
    plain = lm.with_policy(Full()).token_nll(ids)
    np.testing.assert_allclose(whole[:11], plain[:11], atol=1e-5)  # nothing was evicted yet
    assert np.abs(whole - plain).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SirLLM, H2O, TOVA])
def test_what_is_written_is_the_same_in_company_and_with_room_for_all_that_of_full(
    lm, kind, small_steps
):
    roomy = lm.with_policy(kind(32, sinks=2, turn=4))
    together = roomy.generate(PROMPTS, max_new_tokens=8)
    assert together == lm.with_policy(Full()).generate(PROMPTS, max_new_tokens=8)
    tight = lm.with_policy(kind(12, sinks=2, turn=4))
    together = tight.generate(PROMPTS, max_new_tokens=8)
    assert together == [tight.generate(prompt, max_new_tokens=8) for prompt in PROMPTS]


def caches_after(lm, ids, size):
    stored = lm.init_caches(batch=1, capacity=len(ids))
    for start in range(0, len(ids), size):
        piece = ids[None, start : start + size]
        at = np.arange(start, start + piece.shape[1], dtype=np.int32)[None]
        _, stored = lm.forward(piece, at, stored)
    return stored


@pytest.mark.slow
def test_sirllm_remembers_how_surprising_each_token_was(lm, ids):
    nll = lm.with_policy(Full()).token_nll(ids[:12])
    scores = {}
    for how in ("surprise", "reference"):
        one = lm.with_policy(SirLLM(12, sinks=2, turn=4, score=how))
        stored = caches_after(one, ids[:12], 4)
        place, score = (
            np.concatenate([np.asarray(layer.state[name])[:, 0, :, 0] for layer in stored])
            for name in ("pos", "score")
        )
        scores[how] = np.take_along_axis(score, np.argsort(place, axis=1), axis=1)
        np.testing.assert_array_equal(scores[how][0], scores[how][1])  # the same in all layers
    found = scores["surprise"][0]
    # Of the turns that are over, the first token has the largest of its turn.
    expected = np.concatenate([[0], nll])
    expected[[0, 4]] = nll[:3].max(), nll[4:7].max()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    log_p = jax.nn.log_softmax(lm.with_policy(Full()).logits([ids[:11]], last=3)[0])
    again = -np.asarray(log_p)[np.arange(3), ids[8:11]]
    np.testing.assert_allclose(scores["reference"][0][9:], again, atol=1e-5)


def test_a_stream_without_end_is_one_program_a_chunk_and_one_a_token(lm, ids):
    evicting = lm.with_policy(SIRLLM)
    caches_after(evicting, ids[:8], 1)
    with compilations() as compiled:
        held = caches_after(evicting, ids, 1)[0]
    assert "jit(run_layer)" not in compiled
    assert held.k.shape[2] == 12
    assert (np.asarray(held.state["pos"]) >= 0).sum(2).max() <= 12


def test_a_cache_wider_than_the_model_was_trained_at_is_refused(lm):
    with pytest.raises(InputError, match="capacity=40 but this model was trained at 32 tokens"):
        lm.with_policy(H2O(40, turn=4))
