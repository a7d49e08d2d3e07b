"""Tokenizers of Hugging Face folders: tokenizer.json, tokenizer_config.json, chat template."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from lminf.checkpoints.config_fields import Fields, TokenId
from lminf.checkpoints.files import read_json, read_text, write_json
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError, refusing
from lminf.ranges import shown

OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# What is read of tokenizer_config.json, special_tokens_map.json, generation_config.json and
# config.json. A special token is written bare or with its matching rules.
SHAPE: dict[str, Any] = {
    **dict.fromkeys(SPECIAL, str | dict),
    "add_bos_token": bool,
    "chat_template": str | list[dict],
    "eos_token_id": TokenId | list[TokenId],
}
# Letters, white space, what few vocabularies hold, and what none does: every way through a model.
# The long word takes patterns whose time grows with 2 to the length to the library's limit.
_SAMPLE = f"a b, 12\n\té漢🙂\x00{'a' * 64}b"
MOST_TOKENS = 1 << 22  # ids; the largest vocabularies have 2^18 tokens


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, with what the model's files say about the ends of texts.

    None where the folder has none: such a model reads token ids only.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        unread = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if not unread:
            return None
        raise InputError(
            f"{folder} has a tokenizer in {unread[0]} but no tokenizer.json; save it once with "
            f"transformers' fast tokenizer, which writes that file"
        )
    with refusing(str(path), kind="tokenizer"), _panics_unprinted():
        backend = tokenizers.Tokenizer.from_str(read_text(path))
        backend.no_truncation()
        backend.no_padding()
        config = _fields(folder, "special_tokens_map.json", "tokenizer_config.json")
        special = {name: text for name in SPECIAL if (text := _content(config, name)) is not None}
        bos, eos = (special.get(name) for name in ("bos_token", "eos_token"))
        ends = [
            i
            for name in ("generation_config.json", "config.json")
            for i in _as_ids(_fields(folder, name).get("eos_token_id"))
        ]
        if eos is not None and (end := backend.token_to_id(eos)) is not None:
            ends.insert(0, end)
        tokenizer = Tokenizer(
            backend,
            special,
            add_bos=_adds_bos(backend, bos, config.get("add_bos_token")),
            end_ids=tuple(dict.fromkeys(ends)),
            chat_template=_template(folder, config),
        )
        _check(tokenizer, path)
    return tokenizer


@contextlib.contextmanager
def _panics_unprinted() -> Iterator[None]:
    """Keeps the standard error of the process closed to what Rust prints of a panic, with a
    backtrace, before it becomes the exception that says the same."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _check(tokenizer: Tokenizer, path: Path) -> None:
    """Refuses a tokenizer that cannot do what it is for."""
    if tokenizer.vocab_size > MOST_TOKENS:
        raise InputError(
            f"{path} has a token of the id {tokenizer.vocab_size - 1}; no vocabulary has more than "
            f"{MOST_TOKENS} tokens: fetch it again"
        )
    if tokenizer.add_bos and tokenizer.bos_id is None:
        raise InputError(
            f"{path} has no token {shown(tokenizer.special['bos_token'])}, which is put before "
            f"texts; fetch it again"
        )
    tokenizer.encode_with_bytes(_SAMPLE)


def without(tokenizer: Tokenizer, added: str) -> Tokenizer:
    """The tokenizer without one of its tokens that no other is made of."""
    parts = json.loads(tokenizer.backend.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] != added]
    if isinstance(parts["model"]["vocab"], dict):
        parts["model"]["vocab"].pop(added, None)
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    return dataclasses.replace(tokenizer, backend=backend)


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """Saves a tokenizer as transformers and `read` load it."""
    _with_bos(tokenizer).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)


def _fields(folder: Path, *names: str) -> Fields:
    """What the files say, the later ones in the place of the earlier; nothing where there is none.

    Most of what stands in them is for other programs and passed over.
    """
    values: dict[str, Any] = {}
    for name in names:
        if (folder / name).exists():
            values |= read_json(folder / name)
            Fields(values, str(folder / name), SHAPE, {})
    return Fields(values, str(folder / names[-1]), SHAPE, {})


def _content(config: Fields, name: str) -> str | None:
    """A special token's text; transformers writes it bare or with its matching rules."""
    token = config.get(name)
    if isinstance(token, dict):
        return config.part(name, {"content": str}, {}).get("content")
    return token


def _as_ids(ids: Any) -> list[int]:
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if i is not None and i >= 0]


def _adds_bos(backend: tokenizers.Tokenizer, bos: str | None, stated: Any) -> bool:
    """Whether texts begin with BOS: as stated, else as the tokenizer's own last step does it."""
    if bos is None:
        return False
    if stated is not None:
        return bool(stated)
    ids = backend.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == backend.token_to_id(bos)


def _with_bos(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The backend, with a last step that adds BOS if the model wants one, as transformers does."""
    bos = tokenizer.special.get("bos_token")
    if not tokenizer.add_bos or bos is None or _adds_bos(tokenizer.backend, bos, None):
        return tokenizer.backend
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", bos, "$B:1"],
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    return backend


def _template(folder: Path, config: Fields) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    shape = {"name": str, "template": str}
    named = (Fields(one, config.source, shape, {}, "chat_template.") for one in template)
    return next((one["template"] for one in named if one["name"] == "default"), None)
