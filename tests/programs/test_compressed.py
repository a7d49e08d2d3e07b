"""Contexts as embeddings, and as keys and values, behind the contract of reduced contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm.budget import Budget
from lminf.lm.lm import LM
from lminf.models.extensible import ExtensibleTokenizer
from lminf.models.longmem import LongMem
from lminf.programs.compressed import Extensible, Memory
from tests.models import specs

SPEC = specs.change(specs.shallow(specs.LLAMA, 2), vocab_size=257)
MODEL = LM(SPEC, specs.parameters(SPEC), ByteTokenizer())
TOKENIZER = ExtensibleTokenizer(SPEC, layers=1, chunk=8)
LONGMEM = LongMem(SPEC, memory_layer=1, capacity=16, retrieved=4, chunk=2)
TEXT, QUESTION = "abcdefghijklmnopqrst", "uvw"


def methods():
    embeddings = Extensible(MODEL, TOKENIZER, TOKENIZER.init(MODEL.params), (2, 4, 8))
    return embeddings, Memory(MODEL, LONGMEM, LONGMEM.init(MODEL.params), segment=8)


def budget(size):
    return Budget(size, lambda text: MODEL.encode(text)[0], "tokens of it")


@pytest.mark.parametrize("index", [0, 1])
def test_what_cannot_be_reduced_is_refused(index):
    method = methods()[index]
    with pytest.raises(InputError, match="the context is empty"):
        method.reduce("", QUESTION, budget(20))
    with pytest.raises(InputError, match="question takes 3 tokens of it and the budget is 3"):
        method.reduce(TEXT, QUESTION, budget(3))


def test_a_budget_that_no_ratio_or_retrieval_meets_is_refused():
    embeddings, memory = methods()
    with pytest.raises(InputError, match="context of 20 tokens takes 3 embeddings at 8 tokens e"):
        embeddings.reduce(TEXT, QUESTION, budget(5))
    with pytest.raises(InputError, match="every token attends to 4 of the bank, and 3 are left"):
        memory.reduce(TEXT, QUESTION, budget(6))
    with pytest.raises(InputError, match="the context of 5 tokens has no segment of 8"):
        memory.reduce(TEXT[:5], QUESTION, budget(9))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ratio"), [(13, 2), (12, 4), (6, 8)])
def test_a_context_is_as_many_embeddings_as_the_smallest_fitting_ratio_makes(size, ratio):
    embeddings, _ = methods()
    reduced = embeddings.reduce(TEXT, QUESTION, budget(size))
    assert len(reduced.values) == len(TOKENIZER.kept_positions(20, ratio)) <= size - 3
    tokens = jnp.asarray(MODEL.encode(TEXT)[0])[None]
    expected = TOKENIZER.encode(embeddings.params, MODEL.params, tokens, ratio)[0]
    np.testing.assert_allclose(reduced.values, expected, atol=1e-5)
    log_probs = embeddings.next(reduced, QUESTION)
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_context_is_the_keys_and_values_of_its_last_segments():
    _, memory = methods()
    reduced = memory.reduce(TEXT, QUESTION, budget(9))
    tokens = jnp.asarray(MODEL.encode(TEXT[4:])[0]).reshape(2, 1, 8)  # two segments of 8
    bank = LONGMEM.empty(1)
    read = jax.jit(LONGMEM.read)
    for segment in tokens:
        _, bank = read(memory.side, MODEL.params, bank, segment)
    np.testing.assert_allclose(reduced.k, bank.k[0], atol=1e-5)
    np.testing.assert_allclose(reduced.v, bank.v[0], atol=1e-5)
    log_probs = memory.next(reduced, QUESTION)
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-4)
    other = memory.next(memory.reduce(TEXT[::-1], QUESTION, budget(9)), QUESTION)
    assert np.abs(other - log_probs).max() > 1e-3  # what stood before is known from the bank alone
