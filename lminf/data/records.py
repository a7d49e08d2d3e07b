"""Records -> their texts: rows of parquet; JSON as lines, in an array, or one after another."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lminf.config import closest
from lminf.data import byte_streams
from lminf.data.byte_streams import Stream
from lminf.errors import InputError

RECORD_BYTES = 1 << 26  # a record of JSON is parsed whole, which takes up to ten times its size
PARQUET_ROWS = 64  # held at a time
WHITE = re.compile(r"[ \t\r\n]*")

CONVERSATIONS = ("messages", "conversations", "conversation")
INSTRUCTIONS = ("instruction", "output")


def json_texts(stream: Stream, field: str) -> Iterator[str]:
    """The text of each object; "" where it is null."""
    line, number = b"\n", 0
    while line and not line.strip(b"\xef\xbb\xbf \t\r\n"):
        line, number = stream.readline(byte_streams.BLOCK_BYTES), number + 1
    if not line:
        raise InputError(f"{stream.path} holds no line of JSON; leave it out")
    try:
        in_lines = line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        in_lines = False
    if not in_lines:
        stream.unread(line)
        for where, row in _values(_Values(stream, line=number)):
            yield field_of(row, field, where)
        return
    while line:
        where = f"{stream.path} line {number}"
        if len(line) == RECORD_BYTES:
            raise _too_long(where)
        if line.strip():
            yield field_of(_parsed(line, where), field, where)
        line, number = stream.readline(RECORD_BYTES), number + 1


def _too_long(where: str) -> InputError:
    return InputError(
        f"{where}: the record is longer than {RECORD_BYTES >> 20} MiB; put that document into a "
        f"plain text file of its own, which is read in pieces"
    )


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text: byte {line[error.start]:#04x} at its byte {error.start}; "
            f"convert the file to UTF-8 or leave it out"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: numbers of 5,000 digits too
        raise InputError(f"{where} is not JSON ({error}); repair or remove it") from None


class _Values:
    """JSON values one after another, of which one is held at a time."""

    def __init__(self, stream: Stream, *, line: int):
        self.path, self._blocks = stream.path, byte_streams.decoded(stream)
        self._text, self._at, self._line = "", 0, line

    @property
    def where(self) -> str:
        return f"{self.path} line {self._line + self._text.count(chr(10), 0, self._at)}"

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            match = WHITE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Goes past the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        while True:
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
                return value
            except (ValueError, RecursionError) as error:
                refusal = self._refusal(error)
            size = len(self._text) - self._at
            if size >= RECORD_BYTES:
                raise _too_long(self.where)
            # Doubled each time, so that a long value is not parsed anew for every block.
            while len(self._text) - self._at < 2 * size:
                if not self._more():
                    break
            if len(self._text) - self._at == size:
                raise refusal

    def _refusal(self, error: ValueError | RecursionError) -> InputError:
        where, why = self.where, str(error)
        if isinstance(error, json.JSONDecodeError):
            where = f"{self.path} line {self._line + error.lineno - 1} column {error.colno}"
            why = error.msg
        return InputError(f"{where} is not JSON ({why}); repair or remove it")

    def _more(self) -> bool:
        block = next(self._blocks, None)
        if block is None:
            return False
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + block, 0
        return True


def _values(values: _Values) -> Iterator[tuple[str, Any]]:
    """(where, value) of the items of one array, or of objects that follow each other."""
    if values.peek() != "[":
        while values.peek():
            yield values.where, values.value()
        return
    values.skip()
    number = 0
    while (mark := values.peek()) != "]":
        if number and mark == ",":
            values.skip()
            mark = values.peek()
        elif number and mark:
            raise InputError(f"{values.where} has {mark!r} between two items of the array; repair "
                             f"it")  # fmt: skip
        if not mark:
            raise InputError(f"{values.path} ends inside its array, after {number} items; copy it "
                             f"again")  # fmt: skip
        number += 1
        yield f"{values.where} (item {number})", values.value()
    values.skip()
    if values.peek():
        raise InputError(f"{values.where}: something follows the array; repair or remove it")
    if not number:
        raise InputError(f"{values.path} holds an empty array; leave it out")


# --- Rows -----------------------------------------------------------------------------------------


def field_of(row: Any, field: str, where: str) -> str:
    """The text of a row; "" for null."""
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a {type(row).__name__}, not an object; "
                         f"write {{{json.dumps(field)}: …}}")  # fmt: skip
    if field not in row:
        raise InputError(f"{where} has no field {field!r}; {_instead(field, list(row))}")
    return text_of(row[field], field, where)


def text_of(text: Any, field: str, where: str) -> str:
    """The text itself; "" for null."""
    if text is None:
        return ""
    if isinstance(text, list) and text and isinstance(text[0], dict):
        raise InputError(f"{where}: the field {field!r} is a conversation; {_RENDER}")
    if not isinstance(text, str):
        raise InputError(f"{where}: the field {field!r} is {json.dumps(text, default=str)[:40]}, "
                         f"not a text; name the text's (--field)")  # fmt: skip
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of {field!r} is half of a surrogate pair, which is "
            f"no Unicode text; repair or remove it"
        ) from None
    return text


_RENDER = (
    "write each row as one text first, with Tokenizer.chat(messages, reply=False) of the model, "
    "and tokenize those with --special=parse"
)


def _instead(field: str, names: Sequence[str]) -> str:
    """What to do about a row that lacks the field."""
    if conversation := next((name for name in CONVERSATIONS if name in names), None):
        return f"its {conversation!r} is a conversation, not a text: {_RENDER}"
    if all(name in names for name in INSTRUCTIONS):
        return f"it is an instruction with its answer, not a text: {_RENDER}"
    return f"name the text's (--field): {closest(field, names)}"


def parquet_texts(path: Path, field: str) -> Iterator[tuple[str, float]]:
    """(text of a row, share of the rows read with it); "" where it is null."""
    byte_streams.optional("pyarrow", path)
    parquet = byte_streams.optional("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if field not in names:
                raise InputError(f"{path} has no column {field!r}; {_instead(field, names)}")
            if not rows:
                raise InputError(f"{path} holds no rows; leave it out")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    yield text_of(value.as_py(), field, f"{path} row {number}"), number / rows
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not a readable parquet file ({error}); copy it again"
        ) from error
