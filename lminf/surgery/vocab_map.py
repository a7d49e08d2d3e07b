"""Rows for new tokens: a vocabulary map from the tables of a model to those of an extended one.

A map is a sparse matrix M [V_new, V_old], and says which rows nothing is known of. The new table is
M times the old one; unknown rows are drawn with the mean and standard deviation that each channel
has over the old table. Rows of old tokens stay bit for bit. One map serves embeddings and head.

    random   every new row is drawn
    mean     the mean of the rows of the old tokens that the new token's text is made of
    merge    half of each part's row, for the pair of tokens that the new token is merged from
    align    the mean over the places where the new token stands in a text, of the mean of the rows
             of the old tokens that stand there
    focus    of the old tokens of the texts, those that are used most alike: the sparsemax of the
             cosines between vectors of tokens that an auxiliary model gives

Source: Yamaguchi et al. 2024, arXiv:2406.11477; mean: Hewitt 2021; focus: Dobler and de Melo 2023,
arXiv:2305.14481.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import sparse

from lminf.errors import InputError
from lminf.models.spec import ModelSpec
from lminf.types import Params

Rows: TypeAlias = Literal["random", "mean", "merge", "align", "focus"]
Row: TypeAlias = Mapping[int, float]  # old id -> its share, or nothing where nothing is known


@dataclass(frozen=True, eq=False)
class VocabMap:
    """How the rows of a vocabulary's tables follow from those of the vocabulary it extends."""

    matrix: sparse.csr_array  # [V_new, V_old], float64
    unseen: Bool[np.ndarray, " V_new"]  # rows to draw
    old_tokens: int  # of the old vocabulary; its rows stay
    old_rows: int  # V_old, of which those beyond the tokens are padding

    def table(self, old: Float[Array, "V_old ..."], *, seed: int) -> Float[Array, "V_new ..."]:
        """The new table, or vector, of the old one's dtype. The same seed draws the same rows."""
        values = np.asarray(old, np.float32).reshape(len(old), -1)
        if len(values) != self.old_rows:
            raise InputError(
                f"the table has {len(values)} rows but the map is one of {self.old_rows}; "
                f"build it for this model"
            )
        new = np.zeros((len(self.unseen), values.shape[1]), np.float32)
        new[: self.old_tokens] = values[: self.old_tokens]
        new[self.old_tokens :] = self.matrix[self.old_tokens :] @ values.astype(np.float64)
        known, drawn = values[: self.old_tokens], int(self.unseen.sum())
        new[self.unseen] = np.random.default_rng(seed).normal(
            known.mean(0, dtype=np.float64), known.std(0, dtype=np.float64),
            (drawn, values.shape[1]),
        )  # fmt: skip
        return jnp.asarray(new.reshape(-1, *old.shape[1:]), old.dtype)


def vocab_map(rows: Sequence[Row], *, old_tokens: int, old_rows: int) -> VocabMap:
    """The map of a vocabulary that adds a token for each of `rows` to the first `old_tokens`.

    `old_rows` is the length of the old table, which may be padded beyond its tokens; new tokens
    take the places of that padding first.
    """
    new_rows = max(old_tokens + len(rows), old_rows)
    kept = range(old_tokens)
    entries = [(token, token, 1.0) for token in kept]
    entries += [
        (old_tokens + index, old, share)
        for index, row in enumerate(rows)
        for old, share in row.items()
    ]
    entries += [(row, row, 1.0) for row in range(old_tokens + len(rows), old_rows)]
    new_row, old_row, shares = (np.array(column) for column in zip(*entries, strict=True))
    unseen = np.zeros(new_rows, bool)
    unseen[old_tokens : old_tokens + len(rows)] = [not row for row in rows]
    matrix = sparse.csr_array((shares, (new_row, old_row)), shape=(new_rows, old_rows))
    return VocabMap(matrix, unseen, old_tokens, old_rows)


def uniform(ids: Sequence[int]) -> Row:
    """Equal shares of the ids that the old tokenizer makes of a text; of one that is there twice,
    two.
    """
    row: dict[int, float] = {}
    for token in ids:
        row[token] = row.get(token, 0.0) + 1 / len(ids)
    return row


def merge_rows(merges: Iterable[tuple[int, int, int]], *, old_tokens: int, count: int) -> list[Row]:
    """The row of each new token from (left, right, token) ids of all merges, parts before wholes.

    Several merges for one token are averaged. A token that no merge makes of old ones is unknown.
    """
    known: dict[int, list[Row]] = {}

    def row_of(token: int) -> Row:
        if token < old_tokens:
            return {token: 1.0}
        return _weighted([(1.0, row) for row in known.get(token, [])])

    for left, right, token in merges:
        parts = row_of(left), row_of(right)
        if token >= old_tokens and all(parts):
            known.setdefault(token, []).append(_weighted([(1.0, part) for part in parts]))
    return [row_of(token) for token in range(old_tokens, old_tokens + count)]


def align_rows(
    counts: Mapping[int, Mapping[tuple[int, ...], int]],
    otherwise: Sequence[Row],
    *,
    old_tokens: int,
) -> list[Row]:
    """The row of each new token from how often it stood where which old tokens did; of a token
    that never did, the row of `otherwise`.
    """
    return [
        _weighted([(n, uniform(ids)) for ids, n in counts[token].items()])
        if counts.get(token) else default
        for token, default in enumerate(otherwise, old_tokens)
    ]  # fmt: skip


def focus_rows(vectors: Float[np.ndarray, "V d"], *, old_tokens: int) -> list[Row]:
    """The row of each new token by its cosines with the old tokens that have a vector; one whose
    own vector is zero is unknown.
    """
    sizes = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(sizes == 0, 1, sizes)
    old = np.flatnonzero(sizes[:old_tokens, 0])
    if not len(old):
        return [{} for _ in vectors[old_tokens:]]
    shares = sparsemax(directions[old_tokens:] @ directions[old].T)
    return [
        {int(old[place]): float(row[place]) for place in np.flatnonzero(row)} if size else {}
        for row, size in zip(shares, sizes[old_tokens:, 0], strict=True)
    ]


def sparsemax(scores: Float[np.ndarray, "N M"]) -> Float[np.ndarray, "N M"]:
    """The nearest point to each row among those of non-negative entries that sum to 1.

    Source: Martins and Astudillo 2016, arXiv:1602.02068, algorithm 1.
    """
    ordered = -np.sort(-scores, axis=1)
    above = np.cumsum(ordered, 1) - 1
    support = (ordered * np.arange(1, scores.shape[1] + 1) > above).sum(1, keepdims=True)
    threshold = np.take_along_axis(above, support - 1, 1) / support
    return np.maximum(scores - threshold, 0)


def _weighted(rows: Sequence[tuple[float, Row]]) -> Row:
    """The mean of the rows by their weights."""
    total = sum(weight for weight, _ in rows)
    mean: dict[int, float] = {}
    for weight, row in rows:
        for token, share in row.items():
            mean[token] = mean.get(token, 0.0) + share * weight / total
    return mean


def expand(
    spec: ModelSpec, params: Params, vocabulary: VocabMap, *, seed: int
) -> tuple[ModelSpec, Params]:
    """The model with the tables of the extended vocabulary; nothing else changes."""
    tables = ("embed", "head", "head_bias")
    expanded: dict[str, Any] = {
        name: vocabulary.table(value, seed=seed) if name in tables else value
        for name, value in params.items()
    }
    return dataclasses.replace(spec, vocab_size=len(vocabulary.unseen)), expanded
