"""Suffix arrays: in memory by divsufsort, or by our own sort of one range of suffixes at a time.

Beyond a memory limit, splitters that are drawn from the suffixes divide them into buckets, a scan
of the tokens writes every suffix's place into the file of its bucket, and each bucket is sorted and
appended to the table. Comparisons read on until two suffixes differ, so the table is that of a sort
in memory, byte for byte, whatever is repeated; each of the two steps goes on where it was
interrupted.
"""

import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64, Shaped

from lminf.atomic import atomic_write, disk_errors
from lminf.ngram.encoding import WORD_BYTES, Encoding, Queries
from lminf.ngram.search import SortedSuffixes
from lminf.ngram.shard import pointer_bytes

SLOT_BYTES = 80  # of memory while suffixes are sorted: positions, words, orders and groups
PER_BUCKET = 64  # suffixes drawn for each splitter: buckets are of nearly equal size
BLOCK = 1 << 22  # slots that are scanned, or packed, at a time
COMPARED = 64  # tokens of a pair at first, then ever more
LEAST_SETTLED = 8  # one in so many suffixes, while all are sorted by eight bytes

Progress = Callable[[int, int], None]  # (done, of), in slots


def write_table(
    tokens: Shaped[np.ndarray, " N"],
    encoding: Encoding,
    path: Path,
    *,
    memory_bytes: int,
    progress: Progress = lambda done, of: None,
) -> None:
    """Writes the suffix array of the tokens as packed byte offsets; the file appears whole."""
    width = pointer_bytes(tokens.nbytes)
    buckets = path.with_name(f".{path.name}.buckets")
    partial = path.with_name(f".{path.name}.part")
    if in_memory_bytes(len(tokens), encoding) <= memory_bytes and _has_divsufsort():
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            offsets = by_divsufsort(tokens, encoding)
            for start in range(0, len(offsets), BLOCK):
                file.write(packed(offsets[start : start + BLOCK], width))
        shutil.rmtree(buckets, ignore_errors=True)  # of a build that had less memory
        partial.unlink(missing_ok=True)
        progress(len(tokens), len(tokens))
        return
    with disk_errors(path):
        sizes = _scatter(tokens, encoding, buckets, max(1, memory_bytes // SLOT_BYTES), progress)
        written = partial.stat().st_size // width if partial.exists() else 0
        ends = np.cumsum(sizes).tolist()
        done = max((end for end in [0, *ends] if end <= written), default=0)
        with partial.open("ab") as file:
            file.truncate(done * width)
            for number, end in enumerate(ends):
                if end <= done or not sizes[number]:
                    continue
                starts = np.fromfile(buckets / str(number), "<i8")
                ordered = sorted_starts(tokens, starts, encoding)
                file.write(packed(ordered * encoding.width, width))
                file.flush()
                progress(len(tokens) + end, 2 * len(tokens))
            os.fsync(file.fileno())  # after a power cut, a table that is there is whole
        partial.rename(path)
        shutil.rmtree(buckets)


def in_memory_bytes(slots: int, encoding: Encoding) -> int:
    """What divsufsort takes: the text, an integer a byte of it, and the positions that are kept."""
    text = slots * encoding.width
    return text + (4 if text < 2**31 else 8) * (text + 2 * slots)


def _has_divsufsort() -> bool:
    return importlib.util.find_spec("pydivsufsort") is not None


def by_divsufsort(tokens: Shaped[np.ndarray, " N"], encoding: Encoding) -> Int[np.ndarray, " N"]:
    """Byte offsets of the suffixes in their order. Bytes that are big-endian are in order of id."""
    from pydivsufsort import divsufsort  # pyright: ignore[reportMissingImports]

    offsets = divsufsort(np.array(tokens, encoding.sortable).view(np.uint8))
    return offsets[offsets & (encoding.width - 1) == 0]


def packed(offsets: Int[np.ndarray, " N"], width: int) -> bytes:
    """Little-endian integers of `width` bytes."""
    return offsets.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


# --- Buckets --------------------------------------------------------------------------------------


def _scatter(
    tokens: Shaped[np.ndarray, " N"],
    encoding: Encoding,
    folder: Path,
    bucket_slots: int,
    progress: Progress,
) -> list[int]:
    """Writes the starts of all suffixes (tokens) into files by bucket; returns the size of each.
    What an earlier call finished stays as it is.
    """
    finished = folder / "sizes.json"
    if finished.exists():
        return json.loads(finished.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    slots = len(tokens)
    count = -(-slots // bucket_slots)
    drawn = np.random.default_rng(0).integers(0, slots, count * PER_BUCKET)
    sample = sorted_starts(tokens, np.unique(drawn), encoding)
    splitters = sample[np.arange(1, count) * len(sample) // count]
    order = SortedSuffixes(encoding, tokens, splitters.take, len(splitters))
    sizes = np.zeros(count, np.int64)
    for first in range(0, slots, min(BLOCK, bucket_slots)):
        end = min(first + min(BLOCK, bucket_slots), slots)
        starts = np.arange(first, end, dtype=np.int64)
        buckets = np.zeros(len(starts), np.int64)
        if len(splitters):
            queries = Queries(tokens, starts, slots - starts)
            buckets, _ = order.bound(queries, buckets, buckets + len(splitters), after=True)
        counts = np.bincount(buckets, minlength=count)
        parts = np.split(starts[np.argsort(buckets, kind="stable")], np.cumsum(counts)[:-1])
        for number in np.flatnonzero(counts).tolist():
            with (folder / str(number)).open("ab") as file:
                parts[number].astype("<i8").tofile(file)
        sizes += counts
        progress(end, 2 * slots)
    with atomic_write(finished) as temporary:
        temporary.write_text(json.dumps(sizes.tolist()))
    return sizes.tolist()


def sorted_starts(
    tokens: Shaped[np.ndarray, " S"], starts: Int64[np.ndarray, " N"], encoding: Encoding
) -> Int64[np.ndarray, " N"]:
    """The starts in the order of their suffixes: by eight bytes, then those that agree by the next
    eight, and so on; where that tells few apart, as in long repeats, by comparing pairs.
    """
    # A suffix that ends is the shortest of those that agree with it, for which zeros stand in: it
    # is first to begin with, and sorts are stable.
    ordered = np.sort(starts)[::-1].copy()
    per_word = WORD_BYTES // encoding.width
    active = np.arange(len(ordered))  # ranks that are not final yet
    group = np.zeros(len(ordered), np.int64)  # of each: those of a group agree so far
    offset, num_active = 0, 2 * LEAST_SETTLED * len(ordered)
    while len(active) and num_active - len(active) >= num_active / LEAST_SETTLED:
        num_active = len(active)
        keys = encoding.words(tokens, ordered[active] + offset)
        by_key = np.lexsort((keys, group)) if offset else np.argsort(keys, kind="stable")
        keys, ordered[active] = keys[by_key], ordered[active[by_key]]
        same = (keys[1:] == keys[:-1]) & (group[1:] == group[:-1])
        group = np.cumsum(np.append(True, ~same))
        offset += per_word
        stays = (np.bincount(group)[group] > 1) & (ordered[active] + offset < len(tokens))
        active, group = active[stays], group[stays]
    if len(active):
        compare = functools.cmp_to_key(
            functools.partial(_compare, tokens, encoding.sortable, offset)
        )
        for members in np.split(active, np.flatnonzero(np.diff(group)) + 1):
            ordered[members] = sorted(ordered[members].tolist(), key=compare)
    return ordered


def _compare(
    tokens: Shaped[np.ndarray, " S"], kind: np.dtype, offset: int, first: int, second: int
) -> int:
    """-1 where the suffix of the first start is before the other, which agrees for `offset`, as
    the bytes of tokens of that kind are.
    """
    size = COMPARED
    while True:
        pieces = [tokens[start + offset : start + offset + size].astype(kind).tobytes()
                  for start in (first, second)]  # fmt: skip
        if pieces[0] != pieces[1]:
            return -1 if pieces[0] < pieces[1] else 1
        if not pieces[0]:
            return 0  # the same
        offset, size = offset + size, min(4 * size, BLOCK)
