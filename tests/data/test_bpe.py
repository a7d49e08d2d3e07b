"""Tokenizers trained on a text, and every size cut from one training."""

import pytest

from lminf.data import bpe
from lminf.errors import InputError

TEXTS = [f"the number {i} and the number {i * i} are numbers, naïve ones" for i in range(300)]


@pytest.fixture(scope="module")
def trained():
    return bpe.train(TEXTS, 400)


@pytest.mark.parametrize("size", [256, 257, 320, 400])
def test_a_cut_is_what_training_that_size_gives(trained, size):
    cut, own = bpe.cut(trained, size), bpe.cut(bpe.train(TEXTS, size), size)
    assert cut.vocab_size == own.vocab_size == size
    text = TEXTS[7] + " ü 漢\n"
    ids = cut.encode(text)
    assert ids.tolist() == own.encode(text).tolist()
    assert cut.decode(ids) == text
    if size == 256:
        assert len(ids) == len(text.encode())


def test_sizes_are_kept(tmp_path):
    first = bpe.sizes(TEXTS, (256, 300), cache=tmp_path, key="abc")
    again = bpe.sizes(["never read"], (256, 300), cache=tmp_path, key="abc")
    assert first[300].encode(TEXTS[0]).tolist() == again[300].encode(TEXTS[0]).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["bpe-abc-300.json"]


def test_sizes_that_cannot_be(trained):
    with pytest.raises(InputError, match="supports a vocabulary of"):
        bpe.train(TEXTS[:2], 4096)
    with pytest.raises(InputError, match="cannot hold the 256 bytes"):
        bpe.train(TEXTS, 100)
    with pytest.raises(InputError, match="cannot be cut from one of 400"):
        bpe.cut(trained, 401)
