"""The default model, fetched and read as a user gets it."""

import pydoc_data.topics
import sys

import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import fetch
from tests.checkpoints import making

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return checkpoints.load("smollm2-135m-instruct")


def reference_text() -> str:
    """The interpreter's own reference documentation."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def test_it_is_the_file_that_the_table_names(model):
    source = fetch.MODELS["smollm2-135m-instruct"].source
    assert fetch.sha256(fetch.fetch("smollm2-135m-instruct")) == source.sha256
    spec = model.spec
    assert (spec.family, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("llama", 30, 9, 3)
    assert spec.encoding == rope.Rotary(100000.0, 64, "half")
    assert (spec.norm.epsilon, spec.tied) == (1e-5, True)
    assert spec.trained_length == fetch.MODELS["smollm2-135m-instruct"].trained_length


def test_its_tokens(model):
    text, tokenizer = reference_text(), model.tokenizer
    ids, ends = tokenizer.encode_with_bytes(text)
    if sys.version_info[:3] == (3, 11, 7):
        assert len(ids) == 113_108
    assert tokenizer.decode(ids) == text
    assert ends[-1] == len(text.encode())
    assert (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_ids) == (False, 1, (2, 0))
    long = text * 3
    whole = tokenizer.backend.encode(long, add_special_tokens=False).ids
    np.testing.assert_array_equal(tokenizer.encode(long), whole)


def test_it_survives_export_and_import(model, tmp_path):
    checkpoints.save(tmp_path / "model", model)
    again = checkpoints.load(tmp_path / "model")
    assert again.spec == model.spec
    assert again.tokenizer.digest == model.tokenizer.digest
    assert again.tokenizer.eos_ids == model.tokenizer.eos_ids
    making.assert_same(again.params, model.params)
