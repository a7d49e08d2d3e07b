"""Tokenizers of Hugging Face folders: tokenizer.json, tokenizer_config.json, chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError

OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an InputError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, no object; fetch it again")
    return values


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, with what the model's files say about the ends of texts.

    None where the folder has none: such a model reads token ids only.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if not others:
            return None
        raise InputError(
            f"{folder} has a tokenizer in {others[0]} but no tokenizer.json; save it once with "
            f"transformers' fast tokenizer, which writes that file"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare Exceptions for whatever it cannot parse.
    except Exception as error:
        raise InputError(f"{path} is not a tokenizer ({error}); fetch it again") from None
    backend.no_truncation()
    backend.no_padding()
    config = _optional(folder, "special_tokens_map.json") | _optional(
        folder, "tokenizer_config.json"
    )
    special = {name: text for name in SPECIAL if (text := _content(config.get(name))) is not None}
    bos, eos = (special.get(name) for name in ("bos_token", "eos_token"))
    ends = _as_ids(_optional(folder, "generation_config.json").get("eos_token_id"))
    ends += _as_ids(_optional(folder, "config.json").get("eos_token_id"))
    if eos is not None and (end := backend.token_to_id(eos)) is not None:
        ends.insert(0, end)
    return Tokenizer(
        backend,
        special,
        add_bos=_adds_bos(backend, bos, config.get("add_bos_token")),
        end_ids=tuple(dict.fromkeys(ends)),
        chat_template=_template(folder, config),
    )


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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}


def _content(token: Any) -> str | None:
    """A special token's text; transformers writes it bare or with its matching rules."""
    return token.get("content") if isinstance(token, dict) else token


def _as_ids(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


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


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template
