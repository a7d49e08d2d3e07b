"""Text <-> token ids: a tokenizer with what its model wants around a text, and a byte tokenizer.

Every token stands for fixed bytes, and the bytes of a text's tokens joined are the text. That one
table (`token_bytes`) gives decoding, decoding piece by piece, and the byte where each token ends,
which bits per byte need.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lminf.config import closest
from lminf.data import chat_template
from lminf.data.chat_template import Messages
from lminf.errors import InputError, refusing

SPACE = "▁"  # how SentencePiece vocabularies write a space
PIECE_CHARS = 1 << 16  # long texts are encoded in pieces of about this length, in parallel
PIECES_AT_ONCE = 256  # the library's record of an encoding takes ~100 bytes a token

MESSAGE = "\ue000message\ue001"  # in chat_frame; no text has it

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

# What becomes of a special token that is written out in a text: "plain" takes it as the characters
# it is made of, so that nobody's text can hold a control token; "parse" as the token.
Special = Literal["plain", "parse"]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level or SentencePiece-style BPE tokenizer."""

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]  # {"bos_token": "<s>", …}: what chat templates may name
    add_bos: bool  # the model was trained with BOS before each text; encode() never adds it
    end_ids: tuple[int, ...]  # that the model's files declare to end a text or an answer
    chat_template: str | None

    def encode(self, text: str, *, special: Special = "plain") -> Int[np.ndarray, " T"]:
        """Token ids, int32, without BOS."""
        _check_encodable(text)
        # A tokenizer's patterns and rules come with the model, and may fail on this text only.
        with refusing("the text", kind="text of this tokenizer", advice="fetch the model again"):
            backend = self._backend_for(text, special)
            ids = [
                np.asarray(encoding.ids, np.int32)
                for pieces in _batched(self._pieces(text), PIECES_AT_ONCE)
                for encoding in backend.encode_batch_fast(pieces, add_special_tokens=False)
            ]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def encode_with_bytes(
        self, text: str, *, special: Special = "plain"
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Token ids, and the byte of the UTF-8 text where each token ends, int64, never falling.

        Where the tokenizer normalises the text, ends are those of the characters a token came from.
        """
        ids, data = self.encode(text, special=special), text.encode()
        joined = b"".join(map(self.token_bytes.__getitem__, ids.tolist()))
        ends = np.cumsum(self._token_sizes[ids])
        if joined == data:
            return ids, ends
        if joined == b" " + data:  # the space that SentencePiece puts before a text
            return ids, np.maximum(ends - 1, 0)
        encoding = self._backend_for(text, special).encode(text, add_special_tokens=False)
        bytes_before = np.cumsum([0, *(len(c.encode()) for c in text)])
        ends = np.maximum.accumulate(
            [bytes_before[end] for _, end in encoding.offsets], dtype=np.int64
        )
        ends[-1:] = len(data)
        return np.asarray(encoding.ids, np.int32), ends

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(self._bytes_of(i) for i in ids)
        return data.removeprefix(self._prefix).decode(errors="replace")

    def incremental(self) -> "Incremental":
        """Decodes a text that continues another one, token by token."""
        return Incremental(self)

    def chat(self, messages: Messages, *, reply: bool = True) -> str:
        """The conversation as the model was trained to read it, up to where it is to reply.

        Holds every special token, BOS too, and what messages spell like one; `encode_chat` tells
        them apart.
        """
        return "".join(self._split_chat(messages, reply=reply))

    def encode_chat(self, messages: Messages, *, reply: bool = True) -> Int[np.ndarray, " T"]:
        """Token ids of the conversation: only the template writes special tokens."""
        return self.encode_pieces(self._split_chat(messages, reply=reply))

    def chat_frame(self) -> list[str]:
        """What the template writes around one message of a user, up to where it is to reply, as
        pieces for `encode_pieces`; the message is MESSAGE.
        """
        pieces = self._split_chat([{"role": "user", "content": MESSAGE}], reply=True)
        if "".join(pieces[::2]).count(MESSAGE) != 1:
            raise InputError(
                "the chat template of this model does not write a message once and as it is, so "
                "prompts cannot be counted in it; ask without it"
            )
        return pieces

    def encode_pieces(self, pieces: Sequence[str]) -> Int[np.ndarray, " T"]:
        """Token ids of plain text, special token, plain text, …, plain text."""
        text = "".join(pieces)
        _check_encodable(text)
        if not self._controls or self._control.split(text) == list(pieces):
            return self.encode(text, special="parse")
        hidden = self._hidden
        aliased = "".join(hidden.names.get(p, p) if i % 2 else p for i, p in enumerate(pieces))
        ids = hidden.backend.encode(aliased, add_special_tokens=False).ids
        return np.array([hidden.ids.get(i, i) for i in ids], np.int32)

    def _split_chat(self, messages: Messages, *, reply: bool) -> list[str]:
        if self.chat_template is None:
            raise InputError(
                "this model has no chat template; generate from a plain prompt, or use an "
                "instruction-tuned model"
            )
        variables = {**self.special, "add_generation_prompt": reply}
        return chat_template.split(self.chat_template, messages, list(self._controls), variables)

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
    def _controls(self) -> dict[str, AddedToken]:
        added = self.backend.get_added_tokens_decoder().values()
        return {token.content: token for token in added if token.special and token.content}

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Any special token's text, as a group."""
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _backend_for(self, text: str, special: Special) -> tokenizers.Tokenizer:
        if special not in typing.get_args(Special):
            raise InputError(f"special={special!r}; {closest(str(special), ('plain', 'parse'))}")
        if special == "parse":
            return self.backend
        # Few texts spell a special token; then the copy, which takes as much memory, is not made.
        spelled = {each for c in self._controls for each in (c, c.replace(SPACE, " "))}
        named = any(start in text for start in {each[:2] for each in spelled})
        named = named and any(each in text for each in spelled)
        return self._hidden.backend if named else self.backend

    @functools.cached_property
    def _hidden(self) -> "_Hidden":
        """The backend with its special tokens under names that no text holds."""
        parts = json.loads(self.backend.to_str())
        model, controls = parts["model"], self._controls
        if "merges" in model:  # no text may become a special token by merging
            model["merges"] = [m for m in model["merges"] if "".join(m) not in controls]
        elif model["type"] == "Unigram":
            model["vocab"] = [[t, -1e9 if t in controls else score] for t, score in model["vocab"]]
        backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
        backend.encode_special_tokens = True  # that is: as ordinary text
        secret = secrets.token_hex(8)
        names = {content: f"\ue000{secret}.{i}\ue001" for i, content in enumerate(controls)}
        backend.add_tokens(
            [
                AddedToken(names[content], lstrip=token.lstrip, rstrip=token.rstrip,
                           normalized=False, special=False)
                for content, token in controls.items()
            ]
        )  # fmt: skip
        added = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        ids = {added[name]: added[content] for content, name in names.items()}
        return _Hidden(backend, names, ids)

    def __getstate__(self) -> dict[str, Any]:
        # For other processes: what is derived is made anew, as a backend forgets its settings.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

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
            match = cut.search(text, start + PIECE_CHARS)
            end = match.start() if match else len(text)
            yield text[start:end]
            start = end


class _Hidden(NamedTuple):
    backend: tokenizers.Tokenizer
    names: dict[str, str]  # of each special token
    ids: dict[int, int]  # of a name -> of its special token


class ByteTokenizer(Tokenizer):
    """256 bytes and a BOS between documents, for models trained from scratch."""

    def __init__(self):
        vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
        backend = tokenizers.Tokenizer(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<bos>", special=True, normalized=False)])
        super().__init__(backend, {"bos_token": "<bos>"}, False, (256,), None)

    def encode(self, text: str, *, special: Special = "plain") -> Int[np.ndarray, " T"]:
        if special != "plain":
            return super().encode(text, special=special)
        _check_encodable(text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_with_bytes(
        self, text: str, *, special: Special = "plain"
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        if special != "plain":
            return super().encode_with_bytes(text, special=special)
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
    unused = iter(range(0x100, 0x200))
    return tuple(chr(b) if b in printable else chr(next(unused)) for b in range(256))


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
            if match := code.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace(SPACE, " ").encode()

    else:
        raise InputError(
            f"the tokenizer decodes with {', '.join(sorted(kinds)) or 'nothing'}; byte-level and "
            f"SentencePiece-style tokenizers are read"
        )
    return spell
