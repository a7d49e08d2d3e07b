"""Tokenizers of chosen sizes, trained on a text: byte-level BPE, every size cut from one training.

Merges are found greedily, each from the text as merged so far, so the first merges of a large
vocabulary are the merges of a smaller one: one training serves every size up to its own.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lminf.data.tokenizers import SPACE, Tokenizer
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


# --- More tokens for a text that a tokenizer splits finely ----------------------------------------

AUXILIARY_SIZE = 50_000  # of the vocabulary whose merges are taken over, as published


def extend(
    tokenizer: Tokenizer, texts: Sequence[str], count: int, *, multiple: int = 1
) -> Tokenizer:
    """The tokenizer with `count` more tokens for these texts; old tokens keep their ids.

    A BPE vocabulary is trained on the texts alone. Its tokens that the tokenizer lacks are added in
    the order of their merges, which follow those that are there. InputError if there are fewer, or
    if the tokenizer is no BPE; what it says to ask for makes a vocabulary of a `multiple`. Source:
    Yamaguchi et al. 2024, arXiv:2406.11477.
    """
    parts = json.loads(tokenizer.backend.to_str())
    model = parts["model"]
    affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if model["type"] != "BPE" or any(affixes):
        raise InputError(
            f"the tokenizer is a {model['type']} model{' with affixes' if any(affixes) else ''}; "
            f"tokens are added to byte-level and SentencePiece-style BPE"
        )
    if count < 1:
        raise InputError(f"{count} new tokens; give at least one")
    auxiliary = _trained_like(tokenizer.backend, texts)
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    added: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    products = {left + right for left, right in auxiliary["merges"]}
    single = [(token,) for token in auxiliary["vocab"] if token not in products]
    for parts_of in [*single, *map(tuple, auxiliary["merges"])]:
        token = "".join(parts_of)
        if len(added) == count:
            break
        if token not in ids and token not in added:
            added[token] = tokenizer.vocab_size + len(added)
            if len(parts_of) > 1:
                merges.append(parts_of)
    if len(added) < count:
        most = len(added) - (tokenizer.vocab_size + len(added)) % multiple
        raise InputError(
            f"the text gives {len(added)} tokens that the tokenizer lacks, not the {count} that a "
            f"vocabulary of {tokenizer.vocab_size + count} takes: give more text"
            f"{f', or --tokens={most} or fewer' if most > 0 else ''}"
        )
    # The library numbers added tokens that the model lacks anew, behind the model's.
    model["vocab"] |= {token["content"]: token["id"] for token in parts["added_tokens"]} | added
    spaced = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if spaced else list(pair) for pair in merges]
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    return Tokenizer(
        backend, tokenizer.special, tokenizer.add_bos, tokenizer.end_ids, tokenizer.chat_template
    )


def _trained_like(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """The serialised BPE model of a vocabulary trained on the texts, which splits them alike."""
    parts = json.loads(backend.to_str())
    parts |= {"added_tokens": [], "post_processor": None}
    parts["model"] |= {"vocab": {}, "merges": [], "unk_token": None, "byte_fallback": False}
    auxiliary = tokenizers.Tokenizer.from_str(json.dumps(parts))
    if parts["pre_tokenizer"] is None:  # SentencePiece's: words are told apart while merging
        auxiliary.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    auxiliary.train_from_iterator(
        texts,
        # Without all bytes to begin with: SmolLM2 lacks 21 of them, which are in no UTF-8 text or
        # in rare scripts, and they would be the first tokens to be added.
        trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=AUXILIARY_SIZE, min_frequency=2, show_progress=False
        ),
    )
    return json.loads(auxiliary.to_str())["model"]


def pieces_of_added(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """The ids that `old` makes of each token that `new` adds, in the order of their ids."""
    names = {index: name for name, index in new.backend.get_vocab(with_added_tokens=True).items()}
    added = range(old.vocab_size, new.vocab_size)
    # By the model alone: a token may be part of a character, or begin with a space.
    return [[piece.id for piece in old.backend.model.tokenize(names[index])] for index in added]


def merges_of(tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    """(left, right, token) ids of every merge, in order."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield tuple(model["vocab"][part] for part in (left, right, left + right))


def aligned(
    old: Tokenizer, new: Tokenizer, texts: Sequence[str]
) -> dict[int, Counter[tuple[int, ...]]]:
    """How often each token that `new` adds stands where which tokens of `old` do.

    A token of `old` belongs to an occurrence if its bytes in the text are among those of the new
    token, or the other way round. Source: as `extend`; every occurrence counts, while the authors'
    release keeps the last of a document.
    """
    counts: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for text in texts:
        ids, ends = new.encode_with_bytes(text)
        old_ids, old_ends = old.encode_with_bytes(text)
        starts, old_starts = (np.concatenate([[0], e[:-1]]) for e in (ends, old_ends))
        where = np.flatnonzero(ids >= old.vocab_size)
        first = np.searchsorted(old_starts, starts[where])
        last = np.searchsorted(old_ends, ends[where], side="right")
        around = np.searchsorted(old_starts, starts[where], side="right") - 1
        for place, low, high, outer in zip(where, first, last, around, strict=True):
            if high <= low and old_ends[outer] >= ends[place]:
                low, high = outer, outer + 1
            if high > low:
                counts[int(ids[place])][tuple(old_ids[low:high].tolist())] += 1
    return dict(counts)
