"""A model with an extended vocabulary is one that transformers loads, with the same tokens and
logits.
"""

import jax
import numpy as np
import pytest

from lminf import checkpoints
from lminf.data import bpe
from lminf.lm.expand_vocab import expand_vocab
from lminf.lm.lm import LM
from lminf.models import decoder, spec

pytestmark = pytest.mark.parity

ENGLISH = "the cat sat on the mat and then the dog sat on the other cat and that was that " * 40
GREEK = ["η γάτα κάθισε στο χαλί και μετά ο σκύλος κάθισε στην άλλη γάτα και αυτό ήταν όλο "] * 20


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_has_the_same_tokens_and_logits(peer, tied, tmp_path):
    tokenizer = bpe.cut(bpe.train([ENGLISH], 280), 280)
    shape = spec.llama(
        vocab_size=280, width=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48,
        trained_length=256, tied=tied,
    )  # fmt: skip
    lm = LM(shape, decoder.init(shape, key=jax.random.key(0)), tokenizer)
    expanded = expand_vocab(lm, GREEK, tokens=30, rows="align", seed=0)
    checkpoints.save(
        tmp_path / "model",
        checkpoints.Checkpoint(expanded.spec, expanded.params, expanded.tokenizer, "test"),
    )
    theirs = peer.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokens = peer.transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    again = LM.from_pretrained(str(tmp_path / "model"))
    assert theirs.config.vocab_size == 312
    for text in (GREEK[0], ENGLISH[:80], "Μια γάτα, a cat… 漢\n"):
        ids = expanded.tokenizer.encode(text)
        assert their_tokens(text)["input_ids"] == ids.tolist()
        assert again.tokenizer.encode(text).tolist() == ids.tolist()
        assert their_tokens.decode(ids.tolist()) == text
        with peer.torch.no_grad():
            logits = theirs(peer.torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        ours = expanded.logits([ids], last=len(ids))[0]
        np.testing.assert_allclose(ours, logits, atol=2e-5)
