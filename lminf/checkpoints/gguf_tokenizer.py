"""Tokenizer from GGUF metadata, splitting text exactly as the model's Hugging Face tokenizer does."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def _byte_level(*before: Any, use_regex: bool) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last])


_PRE_TOKENIZERS = {
    "gpt-2": lambda: _byte_level(use_regex=True),
    # transformers reads this file with ByteLevel alone (113,108 tokens of pydoc topics); Digits first gives 112,955.
    "smollm": lambda: _byte_level(use_regex=True),
}


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    name = metadata["tokenizer.ggml.pre"]
    if name not in _PRE_TOKENIZERS:
        raise InputError(
            f"the GGUF pre-tokenizer {name!r} is not known; known are {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == _CONTROL
        ]
    )
    return Tokenizer(backend)
