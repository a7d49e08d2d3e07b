"""A model whose policy chooses by content: chunks, rows of unequal length, several devices."""

import dataclasses

import jax
import numpy as np
import pytest

from lminf.attention.policies.hip import InfiniteHiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.topk import TopK
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm.lm import LM
from tests.models import specs

TEXT = "a text of more than forty bytes, which is read in chunks of sixteen"
INFLLM = InfLLM(window=8, sinks=2, topk=1, block=4, repr_topk=1, exec_block=8)
INFINITE = InfiniteHiP((8, 2), (16, 8), (4, 2), window=8, sinks=2, query_block=8, ordered_layers=1)


@pytest.fixture
def choosing(lm):
    return lm.with_policy(INFLLM)


@pytest.mark.slow
def test_chunks_of_whole_groups_read_alike(choosing, monkeypatch):
    whole = choosing.nll(TEXT).token_nll
    monkeypatch.setattr("lminf.lm.nll.CHUNK", 16)
    np.testing.assert_allclose(choosing.nll(TEXT).token_nll, whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [INFLLM, INFINITE], ids=str)
def test_several_devices_read_as_one(lm, policy, small_steps):
    choosing = lm.with_policy(policy)
    found = choosing.with_devices(jax.devices()[:2]).nll(TEXT).token_nll
    np.testing.assert_allclose(found, choosing.nll(TEXT).token_nll, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [INFLLM, TopK(8, sinks=2, topk=3, from_layer=1), INFINITE],
                         ids=str)  # fmt: skip
def test_rows_of_unequal_length_write_as_alone(lm, policy, small_steps):
    lm = lm.with_policy(policy)
    prompts = [TEXT, TEXT[:23], "short"]
    together = lm.generate(prompts, max_new_tokens=12)
    assert together == [lm.generate(prompt, max_new_tokens=12) for prompt in prompts]


def test_a_model_without_rotary_refuses_it(lm):
    spec = specs.change(specs.shallow(specs.MPT, 1), vocab_size=257)
    model = LM(spec, specs.parameters(spec), ByteTokenizer())
    with pytest.raises(InputError, match="moves keys by rotating them, but this model's positions"):
        model.with_policy(dataclasses.replace(INFLLM, window=4))
