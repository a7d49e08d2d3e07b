"""The default model on its default text, against the losses that were measured for it.

Source: a float32 run on two CPU cores over the reference documentation of Python 3.11.7; the Full
row is transformers 5.23's own. Mean nats per token of each 2,048 positions.
"""

import numpy as np
import pytest

from lminf.attention.policy import Full, LMInfinite, Window
from lminf.data import sources
from lminf.evals import perplexity
from lminf.lm.lm import LM

LENGTH, BLOCK = 8192, 2048  # tokens
DIGEST_3_11_7 = "71f2ff5d99bdc1f9"  # of the text that the figures below belong to
MEASURED = {  # policy -> its blocks
    Full(): (2.475, 2.292, 2.388, 2.160),
    LMInfinite(window=4096, sinks=10): (2.475, 2.292, 2.385, 2.476),
    Window(window=4096): (2.475, 2.292, 2.900, 2.995),
    LMInfinite(window=2048, sinks=10): (2.475, 2.314, 2.411, 2.478),
}


@pytest.fixture(scope="module")
def default_model():
    return LM.from_pretrained("smollm2-135m-instruct")


@pytest.mark.slow
@pytest.mark.parametrize("policy", MEASURED, ids=lambda policy: policy.name)
def test_losses_by_position_are_the_measured_ones(default_model, policy):
    text = sources.python_topics()
    nll = default_model.with_policy(policy).nll(text, length=LENGTH).token_nll
    blocks = [block.nll for block in perplexity.by_position([nll], block=BLOCK)][:4]
    if sources.digest(text) == DIGEST_3_11_7:
        np.testing.assert_allclose(blocks, MEASURED[policy], atol=0.01)
    else:  # another interpreter documents itself in other words, about as hard to predict
        np.testing.assert_allclose(blocks, MEASURED[policy], atol=0.5)


@pytest.mark.slow
def test_the_default_text_splits_into_as_many_tokens_as_transformers_counts(default_model):
    text = sources.python_topics()
    if sources.digest(text) == DIGEST_3_11_7:
        assert len(default_model.encode(text)[0]) == 113_108
    else:
        assert len(default_model.encode(text)[0]) > 100_000
