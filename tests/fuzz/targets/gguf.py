"""GGUF files: every architecture, both kinds of tokenizer, and the rotary scalings."""

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lminf import checkpoints
from lminf.checkpoints import gguf_file
from tests.checkpoints import making
from tests.fuzz import mutate as damage

LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
    "llama.rope.scaling.attn_factor": 1.0,
}
_CODES = {bool: (7, "?"), int: (10, "Q"), float: (6, "f")}


def seeds(folder: Path) -> None:
    for architecture in making.GGUF_SPECS:
        name = architecture.replace("/", "_")
        making.write_gguf(folder / f"{name}.gguf", architecture)
    making.write_gguf(folder / "linear.gguf", metadata=LINEAR)
    making.write_gguf(folder / "yarn.gguf", metadata=YARN)
    making.write_gguf(folder / "pieces.gguf", metadata=making.sentence_piece_metadata())
    making.write_gguf(
        folder / "qwen2-words.gguf", "qwen2", metadata={"tokenizer.ggml.pre": "qwen2"}
    )
    making.write_gguf(folder / "q8.gguf", kind="Q8_0")
    factors = np.ones(4, np.float32)
    making.write_gguf(folder / "factors.gguf", changed={"rope_freqs.weight": factors})


def read(path: Path) -> None:
    loaded = checkpoints.load(path)
    assert loaded.tokenizer is not None
    loaded.tokenizer.encode_with_bytes("The cat sat on the mat, 12 times.\n")
    assert loaded.tokenizer.eos_ids is not None
    assert loaded.tokenizer.digest


def mutate(rng: random.Random, path: Path) -> None:
    """Half of the damage is to bytes of the header, half to a value, the file written again."""
    file = gguf_file.open_gguf(path)
    start = min(record.start for record in file.tensors.values())
    if rng.random() < 0.5:
        data = path.read_bytes()
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(start)  # anywhere, not only among the first bytes
            data = data[:at] + damage.change_bytes(rng, data[at:])
        path.write_bytes(data)
        return
    metadata: dict[str, Any] = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
    }
    key = rng.choice(list(metadata))
    metadata[key] = damage.change_value(rng, metadata[key])
    if rng.random() < 0.1:
        metadata[rng.choice(list(metadata))] = metadata.pop(key)
    path.write_bytes(_header(metadata, file.tensors, start) + path.read_bytes()[start:])


def _header(metadata: dict[str, Any], tensors: dict[str, Any], start: int) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _value(value)
        out += _text(key) + struct.pack("<I", kind) + data
    for name, record in tensors.items():
        out += _text(name) + struct.pack("<I", len(record.shape))
        out += struct.pack(f"<{len(record.shape)}Q", *record.shape[::-1])
        out += struct.pack("<IQ", record.type, record.start - start)
    return out + b"\0" * (-len(out) % 32)


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """The number of the format's type, and the bytes; what JSON has and GGUF has not is text."""
    if isinstance(value, list):
        parts = [_value(item) for item in value]
        kind = parts[0][0] if parts else 4
        same = [data for other, data in parts if other == kind]
        return 9, struct.pack("<IQ", kind, len(same)) + b"".join(same)
    if isinstance(value, bool) or (isinstance(value, int) and 0 <= value < 2**64):
        small = not isinstance(value, bool) and value < 2**32  # as converters write most counts
        kind, code = (4, "I") if small else _CODES[type(value)]
        return kind, struct.pack(f"<{code}", value)
    if (isinstance(value, float) and abs(value) < 3e38) or value != value:
        return 6, struct.pack("<f", value)
    return 8, _text(str(value))
