"""Tokenizers of chosen sizes, trained on a text: byte-level BPE, every size cut from one training.

Merges are found greedily, each from the text as merged so far, so the first merges of a large
vocabulary are the merges of a smaller one: one training serves every size up to its own.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError

BYTES = 256  # the smallest vocabulary: every byte, no merge


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `vocab_size` entries. InputError if the texts do not hold that many."""
    if vocab_size < BYTES:
        raise InputError(f"a byte-level vocabulary of {vocab_size} cannot hold the {BYTES} bytes")
    backend = _backend(models.BPE())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    size = backend.get_vocab_size()
    if size < vocab_size:
        raise InputError(
            f"the text supports a vocabulary of {size}, not {vocab_size}: no further pair occurs "
            f"twice; give more text or a smaller vocabulary"
        )
    return backend


def cut(backend: tokenizers.Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer of the first `vocab_size` entries."""
    model = json.loads(backend.to_str())["model"]
    if not BYTES <= vocab_size <= len(model["vocab"]):
        raise InputError(
            f"a vocabulary of {vocab_size} cannot be cut from one of {len(model['vocab'])}; "
            f"train at least that many"
        )
    vocab = {token: index for token, index in model["vocab"].items() if index < vocab_size}
    merges = [tuple(pair) for pair in model["merges"][: vocab_size - BYTES]]
    return Tokenizer(_backend(models.BPE(vocab=vocab, merges=merges)), {}, False, (), None)


def sizes(
    texts: Sequence[str], vocab_sizes: Sequence[int], *, cache: Path, key: str
) -> dict[int, Tokenizer]:
    """A tokenizer of every size, trained on the texts or read from `cache`, where `key`, a digest
    of the texts, names the file.
    """
    largest = max(vocab_sizes)
    path = cache / f"bpe-{key}-{largest}.json"
    if path.is_file():
        backend = tokenizers.Tokenizer.from_file(str(path))
    else:
        backend = train(texts, largest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        backend.save(str(partial))
        partial.replace(path)
    return {size: cut(backend, size) for size in vocab_sizes}


def _backend(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
