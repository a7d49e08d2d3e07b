"""Text <-> token ids: a tokenizer with what its model wants around a text, and a byte tokenizer.

Every token stands for fixed bytes, and the bytes of a text's tokens joined are the text. That one
table (`token_bytes`) gives decoding, decoding piece by piece, and the byte where each token ends,
which bits per byte need.
"""

import codecs
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lminf.errors import InputError

SPACE = "▁"  # how SentencePiece vocabularies write a space
PIECE_CHARS = 1 << 16  # long texts are encoded in pieces of about this length, in parallel
PIECES_AT_ONCE = 256  # the library's record of an encoding takes ~100 bytes a token

# Where models stop when they have answered, beside the end of text that they declare.
END_MARKERS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level or SentencePiece-style BPE tokenizer."""

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]  # {"bos_token": "<s>", …}: what chat templates may name
    add_bos: bool  # the model was trained with BOS before each text; encode() never adds it
    end_ids: tuple[int, ...]  # that the model's files declare to end a text or an answer
    chat_template: str | None

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids, int32, without BOS; special tokens written out in the text are recognised."""
        _check_encodable(text)
        ids = [
            np.asarray(encoding.ids, np.int32)
            for pieces in _batched(self._pieces(text), PIECES_AT_ONCE)
            for encoding in self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        ]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def encode_with_bytes(self, text: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Token ids, and the byte of the UTF-8 text where each token ends, int64, never falling.

        Where the tokenizer normalises the text, ends are those of the characters a token came from.
        """
        ids, data = self.encode(text), text.encode()
        joined = b"".join(map(self.token_bytes.__getitem__, ids.tolist()))
        ends = np.cumsum(self._token_sizes[ids])
        if joined == data:
            return ids, ends
        if joined == b" " + data:  # the space that SentencePiece puts before a text
            return ids, np.maximum(ends - 1, 0)
        whole = self.backend.encode(text, add_special_tokens=False)
        bytes_before = np.cumsum([0, *(len(c.encode()) for c in text)])
        ends = np.maximum.accumulate(
            [bytes_before[end] for _, end in whole.offsets], dtype=np.int64
        )
        ends[-1:] = len(data)
        return np.asarray(whole.ids, np.int32), ends

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(self._bytes_of(i) for i in ids)
        return data.removeprefix(self._prefix).decode(errors="replace")

    def incremental(self) -> "Incremental":
        """Decodes a text that continues another one, token by token."""
        return Incremental(self)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
        """The conversation as the model was trained to read it, up to where it is to reply.

        Holds every special token, BOS too: encode the result as it is.
        """
        if self.chat_template is None:
            raise InputError(
                "this model has no chat template; generate from a plain prompt, or use an "
                "instruction-tuned model"
            )
        try:
            return _compiled(self.chat_template).render(
                messages=messages, add_generation_prompt=reply, **self.special
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template refused these messages: {error}; give a list of "
                f'{{"role": …, "content": …}} in the order that this model expects'
            ) from error

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def bos_id(self) -> int | None:
        token = self.special.get("bos_token")
        return None if token is None else self.backend.token_to_id(token)

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or an answer, the declared ones first."""
        known = {t.content: i for i, t in self.backend.get_added_tokens_decoder().items()}
        markers = (known[marker] for marker in END_MARKERS if marker in known)
        return tuple(dict.fromkeys((*self.end_ids, *markers)))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the serialised tokenizer, hexadecimal; without the step that adds BOS, which
        encode() leaves out."""
        parts = json.loads(self.backend.to_str()) | {"post_processor": None}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token id stands for; nothing for ids that no token has."""
        spell = _speller(json.loads(self.backend.to_str())["decoder"])
        table = [b""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            table[i] = spell(token)
        for i, added in self.backend.get_added_tokens_decoder().items():
            table[i] = added.content.encode()
        return table

    @functools.cached_property
    def _token_sizes(self) -> Int[np.ndarray, " V"]:
        return np.array([len(token) for token in self.token_bytes], np.int64)

    def _bytes_of(self, token: int) -> bytes:
        # Embeddings are often padded to more rows than there are tokens; such rows say nothing.
        return self.token_bytes[token] if 0 <= token < self.vocab_size else b""

    @functools.cached_property
    def _prefix(self) -> bytes:
        """The space that encoding puts before a text and decoding takes away again, if any."""
        ids = self.backend.encode("a", add_special_tokens=False).ids
        return b" " if b"".join(self._bytes_of(i) for i in ids) == b" a" else b""

    @functools.cached_property
    def _divisible(self) -> bool:
        """A text may be cut between a letter and a space without any token noticing.

        So where nothing is put before a text and no token spans such a place: then no merge does
        either, and every pre-tokenizer ends a word there.
        """
        ids = self.backend.encode("a a", add_special_tokens=False).ids
        exact = b"".join(self._bytes_of(i) for i in ids) == b"a a"
        return exact and not any(re.search(rb"[A-Za-z] ", token) for token in self.token_bytes)

    def _pieces(self, text: str) -> Iterator[str]:
        if len(text) <= PIECE_CHARS or not self._divisible:
            yield text
            return
        cut, start = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])"), 0
        while start < len(text):
            found = cut.search(text, start + PIECE_CHARS)
            end = found.start() if found else len(text)
            yield text[start:end]
            start = end


class ByteTokenizer(Tokenizer):
    """256 bytes and a BOS between documents, for models trained from scratch."""

    def __init__(self):
        vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
        backend = tokenizers.Tokenizer(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<bos>", special=True, normalized=False)])
        super().__init__(backend, {"bos_token": "<bos>"}, False, (256,), None)

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        _check_encodable(text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_with_bytes(self, text: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        ids = self.encode(text)
        return ids, np.arange(1, len(ids) + 1)


class Incremental:
    """Text of tokens as they come; never half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes_of = tokenizer._bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._bytes_of(int(token)))

    def finish(self) -> str:
        """U+FFFD if a character was left half said, else nothing."""
        return self._decoder.decode(b"", final=True)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text is half of a surrogate pair, which is no Unicode "
            f"text; read the file as UTF-8"
        ) from None


def _batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --- What tokens stand for ------------------------------------------------------------------------


@functools.cache
def _byte_alphabet() -> tuple[str, ...]:
    """The visible character that byte-level vocabularies write for each byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes take U+0100 and on.
    Source: Radford et al. 2019 (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(b) if b in printable else chr(next(others)) for b in range(256))


def _speller(decoder: Mapping[str, Any] | None):
    """token string -> bytes, for the decoder that the serialised tokenizer names."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    spaces = {"String": SPACE}, " "
    if any((s["pattern"], s["content"]) != spaces for s in steps if s["type"] == "Replace"):
        kinds.add("Replace with another pattern")
    if "ByteLevel" in kinds:
        byte = {character: bytes([b]) for b, character in enumerate(_byte_alphabet())}

        def spell(token: str) -> bytes:
            known = [byte.get(character) for character in token]
            return token.encode() if None in known else b"".join(b for b in known if b)

    elif kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds:
        code = re.compile(r"<0x([0-9A-F]{2})>")

        def spell(token: str) -> bytes:
            if found := code.fullmatch(token):
                return bytes([int(found[1], 16)])
            return token.replace(SPACE, " ").encode()

    else:
        raise InputError(
            f"the tokenizer decodes with {', '.join(sorted(kinds)) or 'nothing'}; byte-level and "
            f"SentencePiece-style tokenizers are read"
        )
    return spell


# --- Chat templates -------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says for training; it prints its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration is a plain set)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that holds no underscored names: they are doors out of the sandbox."""

    def __init__(*args, **kwargs):  # no self, so that a template may store that name
        for name in kwargs:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name}")


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template in the environment that transformers renders it in.

    Sandboxed and immutable, because a template comes with a checkpoint and is a program.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            indent=indent,
            ensure_ascii=ensure_ascii,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = as_json
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
