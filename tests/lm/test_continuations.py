"""Scores of continuations: those of what is written, whatever a policy does while it reads."""

import jax
import numpy as np
import pytest

from lminf.attention.policies.block_topk import MoBA
from lminf.attention.policies.eviction import H2O
from lminf.attention.policies.hip import HiP, InfiniteHiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.prompt_compression import SnapKV
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import PerLayer
from lminf.lm import generate
from lminf.lm.prefix import SharedPrefix
from lminf.models import heads

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."
WRITTEN = 7
INFLLM = InfLLM(8, 2, topk=2, block=4, exec_block=8)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "policy",
    [
        INFLLM,
        pytest.param(TopK(8, 2, topk=2, from_layer=0), marks=slow),
        pytest.param(HiP(8, 8, 2, query_block=8, dense_layers=0), marks=slow),
        pytest.param(InfiniteHiP((16, 8, 4), (32, 16, 8), (4, 2, 1), 8, 2, 8),
                     marks=slow),
        pytest.param(MoBA(8, 2), marks=slow),
        pytest.param(SnapKV(20, window=4), marks=slow),
        pytest.param(PerLayer((SnapKV(20, window=4), INFLLM)), marks=slow),
        pytest.param(PerLayer((H2O(32, sinks=2, recent=8, turn=16), INFLLM)), marks=slow),
    ],
    ids=["infllm", "topk", "hip", "infinite_hip", "moba", "snapkv", "snapkv_and_infllm",
         "h2o_and_infllm"],
)  # fmt: skip
def test_what_is_written_is_the_likeliest_at_every_token(lm, policy, small_steps):
    lm = lm.with_policy(policy)
    prompt = np.asarray(lm.tokenizer.encode(TEXT), np.int32)
    options = {"sampling": generate.GREEDY, "max_new_tokens": WRITTEN, "key": jax.random.key(0)}
    written = np.concatenate(list(generate.generate_tokens(lm, [prompt], **options)))
    assert lm.score_tokens(np.append(prompt, written), len(prompt)).greedy
    other = np.append(written[:-1], written[-1] ^ 1)
    found = SharedPrefix(lm).score_tokens([(np.append(prompt, end), len(prompt))
                                           for end in (written[:3], other)])  # fmt: skip
    assert [score.greedy for score in found] == [True, False]


def test_infllm_looks_blocks_up_for_the_last_token_of_a_prompt_alone(lm, small_steps):
    lm = lm.with_policy(INFLLM)
    ids = np.asarray(lm.tokenizer.encode(TEXT), np.int32)[None, :64]  # whole chunks, and groups
    positions, caches = np.arange(64, dtype=np.int32)[None], lm.init_caches(batch=1, capacity=64)
    together, _ = lm.forward(ids, positions, caches)
    _, caches = lm.forward(ids[:, :-1], positions[:, :-1], lm.init_caches(batch=1, capacity=64))
    alone, _ = lm.forward(ids[:, -1:], positions[:, -1:], caches)
    expected, otherwise = (
        np.asarray(heads.lm(lm.spec, lm.params, hidden[:, -1:])) for hidden in (alone, together)
    )
    found = lm.logits([ids[0]])
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - otherwise).max() > 1e-2
