"""The bytes of a GGUF file: its metadata as a dictionary, its tensors as float32.

Layout (little-endian): magic, version, counts; key/value pairs; one record per tensor with its
offset; padding; data. Source: ggml's docs/gguf.md. Only the header is parsed here, because the
`gguf` package's reader keeps every string of the vocabulary as its own memory map and needs three
seconds for what takes a tenth; the numbers behind each tensor type are the package's.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lminf.atomic import check_regular
from lminf.errors import InputError
from lminf.ranges import shown

# Codes of `struct` and numpy by the format's number for a kind of value.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # of a model in several files
MOST_PARTS = 1 << 12
_MAX_DIMENSIONS = 4  # of a tensor in ggml
_PAIR_BYTES, _TENSOR_BYTES = 13, 24  # the least that a key with its value, or a record, takes
# What the package turns into numbers, of those that files have tensors of.
DEQUANTISED = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M",
    "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
_VALUES_AT_ONCE = 1 << 18  # dequantised at a time, so that temporaries stay in cache


class TensorRecord(NamedTuple):
    shape: tuple[int, ...]  # slowest axis first, as numpy has it
    type: gguf.GGMLQuantizationType
    start: int  # byte in the file
    size_bytes: int
    part: int = 0  # of a model in several files


class _Cursor:
    """Reads values one after another; running off the end means the file was cut short."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def need(self, count: int, size: int = 1) -> int:
        """The bytes of `count` things of at least `size` bytes, which the file must still have."""
        if count * size > len(self.data) - self.at:
            raise cut_short(self.path, len(self.data))
        return count * size

    def take(self, count: int) -> bytes:
        self.at += self.need(count)
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start = self.at
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"has no text at byte {start}, where text belongs") from None

    def value(self, kind: int) -> Any:
        """A number, a text, an array of numbers (numpy), or a list of texts."""
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            # The shortest decimal that means this float32: 1e-5, not 9.999999747378752e-06.
            return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                dtype = np.dtype(_SCALARS[inner]).newbyteorder("<")
                return np.frombuffer(self.take(self.need(count, dtype.itemsize)), dtype)
            if inner == _STRING:
                self.need(count, struct.calcsize("<Q"))
                return [self.string() for _ in range(count)]
            kind = inner
        raise InputError(
            f"{self.path} has a metadata value of the unknown kind {kind}; it is damaged or newer "
            f"than version 3 of GGUF"
        )


def damaged(path: Path, finding: str) -> InputError:
    return InputError(f"{path} {finding}; it is damaged, fetch it again")


def cut_short(path: Path, num_bytes: int) -> InputError:
    return InputError(
        f"{path} is cut short: its {num_bytes} bytes end before what its header announces; fetch "
        f"it again"
    )


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]
    data: tuple[mmap.mmap, ...]  # one for each part

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, in its stored shape."""
        record = self.tensors[name]
        raw = np.frombuffer(self.data[record.part], np.uint8, record.size_bytes, record.start)
        if record.type == gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(record.shape)
        if record.type == gguf.GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32).reshape(record.shape)
        # Blocks follow one another whatever the rows, so one long row at a time will do.
        out = np.empty(math.prod(record.shape), np.float32)
        block, block_bytes = gguf.GGML_QUANT_SIZES[record.type]
        count = _VALUES_AT_ONCE // block
        for i in range(0, record.size_bytes // block_bytes, count):
            part = raw[i * block_bytes : (i + count) * block_bytes]
            with np.errstate(all="ignore"):  # of scales that are no numbers, in damaged files
                out[i * block : (i + count) * block] = gguf.quants.dequantize(part, record.type)
        return out.reshape(record.shape)


def open_gguf(path: Path) -> GGUFFile:
    """The header of a model in one file, or of all of its parts where `path` is the first of them;
    tensors stay on disk until they are read.
    """
    first = _open_part(path)
    parts = first.metadata.get("split.count", 1)
    if parts in (0, 1):
        return first
    number, name = first.metadata.get("split.no", 0), PART.fullmatch(path.name)
    if type(parts) is not int or parts > MOST_PARTS or name is None or int(name[3]) != parts:
        raise InputError(
            f"{path} is one of {shown(parts)} parts of a model but is not named so; give each its "
            f"own name, as in model-00001-of-00003.gguf"
        )
    if number != 0 or int(name[2]) != 1:
        first_name = f"{name[1]}-00001-of-{name[3]}.gguf"
        raise InputError(
            f"{path} is part {int(name[2])} of {parts}; give the first one, {first_name}"
        )
    tensors, data = dict(first.tensors), [*first.data]
    for index in range(1, parts):
        other_path = path.with_name(f"{name[1]}-{index + 1:05}-of-{name[3]}.gguf")
        if not other_path.is_file():
            raise InputError(f"{other_path} is missing, one of {parts} parts; fetch it too")
        part = _open_part(other_path)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (index, parts):
            raise InputError(f"{other_path} is no part of {path}; fetch both again")
        if twice := tensors.keys() & part.tensors.keys():
            raise damaged(other_path, f"holds {shown(min(twice))}, as another part does")
        tensors |= {key: record._replace(part=index) for key, record in part.tensors.items()}
        data += part.data
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise damaged(path, f"has {len(tensors)} of {shown(expected)} tensors in its {parts} parts")
    return GGUFFile(path, first.metadata, tensors, tuple(data))


def _open_part(path: Path) -> GGUFFile:
    """The file's header, checked against its length."""
    check_regular(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(
                f"{path} is not a GGUF file (it does not begin with the letters GGUF); give a "
                f".gguf file or a folder with safetensors"
            )
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data, path)
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise InputError(
            f"{path} is version {version} of GGUF, or written for big-endian machines; versions 2 "
            f"and 3, little-endian, are read"
        )
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = _metadata(cursor, pair_count)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"has general.alignment = {alignment!r}, which is no power of two")
    records = _records(cursor, tensor_count, alignment)
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: record._replace(start=start + record.start) for name, record in records.items()
    }
    last_end = 0
    for name, record in sorted(tensors.items(), key=lambda item: item[1].start):
        if record.start < last_end:
            raise damaged(path, f"has {name} where another tensor lies")
        last_end = record.start + record.size_bytes
    if last_end > len(data):
        raise cut_short(path, len(data))
    return GGUFFile(path, metadata, tensors, (data,))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.need(count, _PAIR_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise damaged(cursor.path, f"has {shown(key)} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata


def _records(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorRecord]:
    """Records by name, their `start` counted from the first byte of the data."""
    cursor.need(count, _TENSOR_BYTES)
    records: dict[str, TensorRecord] = {}
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.scalar("I")
        if name in records or dimensions > _MAX_DIMENSIONS:
            finding = "twice" if name in records else f"with {dimensions} dimensions"
            raise damaged(cursor.path, f"holds {shown(name)} {finding}")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        kind, start = cursor.scalar("I"), cursor.scalar("Q")
        if start % alignment:
            raise damaged(cursor.path, f"has {shown(name)} at the odd place {start}")
        records[name] = _record(cursor.path, name, shape, kind, start)
    return records


def _record(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorRecord:
    try:
        tensor_type = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if tensor_type.name not in DEQUANTISED:
            raise KeyError(tensor_type)
    except (ValueError, KeyError):
        raise InputError(
            f"{shown(name)} in {path} has the tensor type {kind}, which is not read; use a file "
            f"quantised as one of {', '.join(DEQUANTISED)}"
        ) from None
    size = math.prod(shape)
    if size < 1 or (shape[-1:] and shape[-1] % block):
        raise damaged(path, f"holds {shown(name)} of the shape {shape}, in blocks of {block}")
    return TensorRecord(shape, tensor_type, start, size // block * block_bytes)
