"""SnapKV and ThinK in a model: prompts, what follows them, and texts that have none."""

import jax
import numpy as np
import pytest

from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policy import Full, PerLayer
from lminf.errors import InputError
from lminf.lm import continuations, layerwise
from lminf.lm.prefix import SharedPrefix
from tests.cases import compilations

TEXT = "Straße: forty-one tokens, a few in bytes"
PROMPTS = ["Twenty bytes of text", "Seven b", "Eleven byte"]


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer.encode(TEXT)


@pytest.mark.slow
def test_losses_after_a_prompt_of_which_all_is_kept_are_those_of_full(lm, ids, small_steps):
    """24 tokens of prompt are three chunks, and the rest is read in more."""
    plain = lm.with_policy(Full()).token_nll(ids)
    found = lm.with_policy(ThinK(0.0, recent=4)).token_nll(ids, prompt=24)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    on_two = lm.with_policy(ThinK(0.0, recent=4)).with_devices(jax.devices()[:2])
    np.testing.assert_array_equal(on_two.token_nll(ids, prompt=24), found)
    thinner = lm.with_policy(ThinK(0.5, recent=4, capacity=12)).token_nll(ids, prompt=24)
    np.testing.assert_allclose(thinner[:24], plain[:24], atol=1e-5)
    assert np.abs(thinner[24:] - plain[24:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", [SnapKV(40, window=4), ThinK(0.0, recent=4)])
def test_what_is_written_after_all_of_a_prompt_is_that_of_full(lm, policy, small_steps):
    full = lm.with_policy(Full()).generate(PROMPTS, max_new_tokens=8)
    assert lm.with_policy(policy).generate(PROMPTS, max_new_tokens=8) == full


@pytest.mark.slow
def test_what_is_written_is_the_same_in_company_and_compiled_once(lm, small_steps):
    policy = lm.with_policy(ThinK(0.25, recent=4, capacity=8))
    alone = [policy.generate(prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert policy.generate(PROMPTS, max_new_tokens=8) == alone
    with compilations() as compiled:
        policy.generate(PROMPTS[0][:17], max_new_tokens=6)
    assert "jit(run_layer)" not in compiled


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(20, window=4),
        pytest.param(ThinK(0.5, recent=4), marks=pytest.mark.slow),
        pytest.param(PerLayer((SnapKV(20, window=4), Full())), marks=pytest.mark.slow),
    ],
    ids=["snapkv", "think", "snapkv_and_full"],
)
def test_a_score_is_of_what_follows_the_compressed_prompt(lm, ids, policy, small_steps):
    model, start = lm.with_policy(policy), 24
    ends = [ids[start:], ids[start : start + 3], ids[start : start + 1]]
    pairs = [(np.append(ids[:start], end), start) for end in ends]
    found = [model.score_tokens(*pair) for pair in pairs]
    losses = model.token_nll(ids, prompt=start)[start - 1 :]
    for end, score in zip(ends, found, strict=True):
        assert score.log_prob == pytest.approx(-losses[: len(end)].sum(), abs=1e-4)
    for one, other in zip(SharedPrefix(model).score_tokens(pairs), found, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
        assert one[1:] == other[1:]
    plain = lm.with_policy(Full()).score_tokens(*pairs[0])
    assert abs(plain.log_prob - found[0].log_prob) > 1e-2  # it would be a score of full attention
    kept = lm.with_policy(ThinK(0.0, recent=4)).score_tokens(*pairs[0])
    assert kept.log_prob == pytest.approx(plain.log_prob, abs=1e-4)


def test_the_prompt_of_several_continuations_is_read_once(lm, ids, small_steps, monkeypatch):
    read, forward = [], layerwise.LayerwiseDecoder.__call__

    def counted(self, tokens, *rest):
        read.append(tokens.size)
        return forward(self, tokens, *rest)

    monkeypatch.setattr(layerwise.LayerwiseDecoder, "__call__", counted)
    model = SharedPrefix(lm.with_policy(SnapKV(20, window=4)))
    model.score_tokens([(ids[: 24 + more], 24) for more in (2, 4, 1)])
    # A continuation of one token is predicted by the prompt.
    assert sum(read) == 2 * 16 + 2 * continuations.PIECE


def test_a_text_without_a_prompt_is_refused(lm, ids):
    snapkv = lm.with_policy(SnapKV(40))
    with pytest.raises(InputError, match="acts at the end of a prompt, and a text has none; say"):
        snapkv.token_nll(ids)
    with pytest.raises(InputError, match="prompt=41 of a text of 41 tokens; give at least 1"):
        snapkv.token_nll(ids, prompt=len(ids))
