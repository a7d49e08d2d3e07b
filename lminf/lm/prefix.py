"""Answers to many prompts that begin alike: what several of them begin with is read once.

The prompts of an evaluation share examples, a book, or the filler before a key that stands deeper
in each. The prompt that agrees longest with the others, the trunk, is read chunk by chunk; where
others leave it, they go on from copies of its caches. Each prompt so meets the chunks that
`LM.generate` reads, in their order, and its answer is the same.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from lminf.attention import cache
from lminf.attention.sparse import WHOLE_CALL, SparsePolicy
from lminf.errors import InputError
from lminf.lm import continuations
from lminf.lm import generate as decoding
from lminf.lm.generate import GREEDY
from lminf.lm.lm import LM
from lminf.lm.protocol import OnAnswer, Score
from lminf.models import heads
from lminf.models.layer_policies import chunk_within, common_eviction, last_alone

BATCH_TOKENS = 8192  # prompt tokens read side by side: more of them is no faster on a CPU
TAIL_ROWS = 16  # tails read side by side
TAIL = 16  # tokens: continuations of a prompt are filled up to multiples of these
Chunk = tuple[Int[np.ndarray, "P _"], Int[np.ndarray, "P _"]]  # tokens, positions
Pair: TypeAlias = tuple[Int[np.ndarray, " T"], int]  # tokens, and where the continuation begins


@dataclass(frozen=True)
class SharedPrefix:
    """A LanguageModel with the answers of `lm`: what prompts of a call begin with is read once."""

    lm: LM
    rows: int | None = None  # prompts read side by side; None: as many as have BATCH_TOKENS tokens

    def count_tokens(self, text: str) -> int:
        return self.lm.count_tokens(text)

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """As `LM.score`; what all continuations of a prompt follow is read once, and what nearly
        all of several prompts is, such as a text with different questions.

        Policies that act at the end of a prompt or of a call read each prompt by itself. Where
        queries select in groups, those of a prompt are of a text that is read at once, and tokens
        of a continuation select one by one, as where they are written.
        """
        pairs = zip(prompts, continuations, strict=True)
        return self.score_pairs([self.lm.encode_continuation(*pair) for pair in pairs])

    def score_pairs(self, pairs: Sequence[Pair]) -> list[Score]:
        """As `LM.score_tokens` of each pair."""
        families: list[list[int]] = []
        for index, pair in enumerate(pairs):
            alike = (each for each in families if _nearly_all_shared(pair, pairs[each[0]]))
            family = next(alike, None)
            if family is None:
                families.append(family := [])
            family.append(index)
        scores: dict[int, Score] = {}
        for family in families:
            scores |= dict(
                zip(family, self.score_tokens([pairs[index] for index in family]), strict=True)
            )
        return [scores[index] for index in range(len(pairs))]

    def score_tokens(self, pairs: Sequence[Pair]) -> list[Score]:
        """As `LM.score_tokens`, of texts that begin alike."""
        shared = _shared_tokens(self.lm, pairs)
        if not shared:
            found = _by_prompt(self.lm, pairs)
        elif any(isinstance(policy, SparsePolicy) for policy in self.lm.decoder.policies):
            found = _after_prompts(self.lm, shared, pairs)
        else:
            found = _log_probs_of(self.lm, shared, pairs)
        scores = {
            index: Score.of(log_probs, pairs[index][0][pairs[index][1] :])
            for index, log_probs in found
        }
        return [scores[index] for index in range(len(pairs))]

    def next(self, prompts: Sequence[str | np.ndarray]) -> Float32[np.ndarray, "B V"]:
        """As `LM.next`; what all prompts begin with is read once if it is most of them."""
        encoded = self.lm.encode_prompts(prompts)
        pairs = [(np.append(ids, 0), len(ids)) for ids in encoded]  # the last one is not read
        shared = _shared_tokens(self.lm, pairs)
        if 2 * shared <= max(map(len, encoded), default=0):
            return self.lm.next(prompts)
        log_probs = dict(_log_probs_of(self.lm, shared, pairs))
        return np.concatenate([log_probs[index] for index in range(len(pairs))])

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "B D"]:
        return self.lm.embed(texts)

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_answer: OnAnswer | None = None,
    ) -> list[str]:
        """What the model writes after each prompt: greedily, as `LM.generate` of it alone.

        Prompts that leave the trunk together, or share nothing with any, are read side by side,
        each with caches of its own beside the trunk's.
        """
        lm = self.lm
        encoded = lm.encode_prompts(prompts)
        decoding.check_new_tokens(max_new_tokens)
        lm.check_length(max(map(len, encoded), default=0) + max_new_tokens)
        chunks = list(decoding.pieces(lm, encoded))
        lengths = np.array([len(ids) for ids in encoded], np.int32)
        longest, texts = int(lengths.max()), [""] * len(encoded)
        empty = partial(decoding.empty_caches, lm, rows=1, longest=longest, room=max_new_tokens)
        rows = max(1, BATCH_TOKENS // longest) if self.rows is None else self.rows
        for members, begun, caches in _branches(lm, chunks, empty, rows):
            written = decoding.decode_loop(
                lm, _of_rows(chunks[begun:], members), caches, lengths=lengths[members],
                sampling=GREEDY, max_new_tokens=max_new_tokens, key=jax.random.key(0),
            )  # fmt: skip
            for row, piece in lm.detokenize(written, rows=len(members), stop=stop):
                texts[members[row]] += piece
            if on_answer:
                for index in members:
                    on_answer(index, texts[index])
        return texts


def _nearly_all_shared(one: Pair, other: Pair) -> bool:
    """Whether the prompts agree but for a sixteenth of them, which each continuation reads again,
    or but for a word at the end, which may be other tokens before another continuation.
    """
    shorter, longer = sorted((one[1], other[1]))
    differ = np.flatnonzero(one[0][:shorter] != other[0][:shorter])
    shared = int(differ[0]) if len(differ) else shorter
    return longer - shared <= max(longer // 16, 2)


def _shared_tokens(lm: LM, pairs: Sequence[Pair]) -> int:
    """How many tokens to read once for all of these, so that each reads as it would by itself."""
    policies = lm.decoder.policies
    groups = [policy.group for policy in policies if isinstance(policy, SparsePolicy)]
    by_itself = any(policy.needs_prompt or getattr(policy, "last_only", False)
                    for policy in policies)  # fmt: skip
    if len(pairs) < 2 or WHOLE_CALL in groups or by_itself:
        return 0
    shortest = min(start for _, start in pairs) - 1  # its last token predicts the continuation
    alike = np.logical_and.reduce([pairs[0][0][:shortest] == ids[:shortest] for ids, _ in pairs])
    common = shortest if alike.all() else int(alike.argmin())
    step = math.lcm(*groups, common_eviction(policies) or 1)
    return common // step * step


def _log_probs_of(
    lm: LM, shared: int, pairs: Sequence[Pair]
) -> Iterator[tuple[int, Float32[np.ndarray, "_ V"]]]:
    """The index of each pair, in any order, and the log-probabilities (nats) of what follows at
    each token of its continuation. Pairs that differ in their last token alone, such as the letters
    of options, have one tail.
    """
    members: dict[bytes, list[int]] = {}
    for index, (tokens, _) in enumerate(pairs):
        members.setdefault(tokens[shared:-1].tobytes(), []).append(index)
    # One width, so that few programs are compiled.
    longest = max(len(tokens) for tokens, _ in pairs) - 1 - shared
    width = -(-longest // TAIL) * TAIL
    tails = np.full((len(members), width), -1, np.int32)
    for row, (index, *_) in zip(tails, members.values(), strict=True):
        tokens, _ = pairs[index]
        row[: len(tokens) - 1 - shared] = tokens[shared:-1]
    first = min(start for _, start in pairs) - 1 - shared
    parts = np.array_split(tails, -(-len(tails) // TAIL_ROWS))  # of nearly one size
    results = log_probs_after(
        lm, pairs[0][0][:shared], [Tails(part, width - first) for part in parts]
    )
    for log_probs, indices in zip(itertools.chain(*results), members.values(), strict=True):
        for index in indices:
            tokens, start = pairs[index]
            begin = start - 1 - shared - first
            yield index, log_probs[begin : begin + len(tokens) - start]


def _by_prompt(lm: LM, pairs: Sequence[Pair]) -> Iterator[tuple[int, Float32[np.ndarray, "_ V"]]]:
    """As `_log_probs_of`, of prompts that share nothing unless they are equal."""
    for prompt, indices, after in _prompts(pairs):
        yield from zip(indices, continuations.log_probs(lm, prompt, after), strict=True)


def _after_prompts(
    lm: LM, shared: int, pairs: Sequence[Pair]
) -> Iterator[tuple[int, Float32[np.ndarray, "_ V"]]]:
    """As `_log_probs_of`, where queries select: what follows a prompt is read as it is written."""
    longest = max(len(tokens) for tokens, _ in pairs) + TAIL + continuations.PIECE
    caches = decoding.empty_caches(lm, rows=1, longest=longest, room=0)
    step = chunk_within(common_eviction(lm.decoder.policies), decoding.STEP)
    caches = _read_prefix(lm, pairs[0][0][:shared], step, caches)
    alone = last_alone(lm.decoder.policies)
    for prompt, indices, after in _prompts(pairs):
        read, ends = _copies(caches, 1), len(prompt) - alone - shared
        tail = np.full((1, -(-ends // TAIL) * TAIL), -1, np.int32)
        tail[0, :ends] = prompt[shared : shared + ends]
        states, read = _extended(lm, tail, shared, step, read)
        if alone:
            states, read = _extended(lm, prompt[None, -1:], len(prompt) - 1, step, read)
        last = jnp.concatenate(states, axis=1)[:, 0 if alone else ends - 1][:, None]
        log_probs = continuations.after_prompt(lm, last, read, len(prompt), after)
        yield from zip(indices, log_probs, strict=True)


def _prompts(
    pairs: Sequence[Pair],
) -> Iterator[tuple[Int[np.ndarray, " P"], list[int], list[Int[np.ndarray, " _"]]]]:
    """Every prompt, which pairs have it, and their continuations."""
    members: dict[bytes, list[int]] = {}
    for index, (tokens, start) in enumerate(pairs):
        members.setdefault(tokens[:start].tobytes(), []).append(index)
    for indices in members.values():
        tokens, start = pairs[indices[0]]
        yield tokens[:start], indices, [pairs[index][0][start:] for index in indices]


class Tails(NamedTuple):
    """Texts that follow the same prefix, each instead of the others."""

    tokens: Int[np.ndarray, "R C"]  # -1 at the end of shorter ones: nothing there, and not read
    last: int  # tokens of each, counted from its end, whose predictions are asked for


def log_probs_after(
    lm: LM, prefix: Int[np.ndarray, " P"], tails: Sequence[Tails]
) -> Iterator[Float32[np.ndarray, "R last V"]]:
    """Log-probabilities (nats) of what follows each of the last tokens of every tail, which stands
    directly after the prefix. The prefix is read once for all tails.

    A policy that selects for the last query of a call alone does so for the last token of a tail,
    and for one that acts at the end of a prompt the prefix is the prompt.
    """
    room = max(each.tokens.shape[1] for each in tails)
    longest = len(prefix) + room
    lm.check_length(longest)
    evict_every = common_eviction(lm.decoder.policies)
    if len(prefix) % (evict_every or 1):
        raise InputError(
            f"{lm.policy.name} evicts every {evict_every} tokens, and a prefix of {len(prefix)} "
            f"ends between; give a multiple of {evict_every} tokens"
        )
    step = chunk_within(evict_every, decoding.STEP)
    caches = decoding.empty_caches(lm, rows=1, longest=longest, room=0)
    caches = _read_prefix(lm, np.asarray(prefix, np.int32), step, caches)
    if any(policy.needs_prompt for policy in lm.decoder.policies):
        caches = decoding.prepare_decoding(lm.decoder, caches, length=len(prefix), room=room)
    # Small caches fill the processor together; one that keeps every token does so by itself.
    rows = TAIL_ROWS if all(policy.bounded for policy in lm.decoder.policies) else 1
    for tokens, last in tails:
        log_probs = []
        for start in range(0, len(tokens), rows):
            batch = np.asarray(tokens[start : start + rows], np.int32)
            copies = _copies(caches, len(batch))
            states, _ = _extended(lm, batch, len(prefix), step, copies)
            states = np.concatenate([np.asarray(each) for each in states], 1)[:, -last:]
            log_probs.append(np.asarray(_log_probs(lm.spec, lm.params, states)))
        yield np.concatenate(log_probs)


def _read_prefix(lm: LM, prefix: Int[np.ndarray, " P"], step: int, caches: Any) -> Any:
    """The caches with the prefix in them."""
    policies = lm.decoder.policies
    if common_eviction(policies) or any(isinstance(policy, SparsePolicy) for policy in policies):
        return _extended(lm, prefix[None], 0, step, caches)[1]  # padding would enter their groups
    # Filled up to one of few widths: each width is compiled.
    for tokens, positions in decoding.pieces(lm, [prefix]):
        _, caches = lm.on_one_device.forward(jnp.asarray(tokens), jnp.asarray(positions), caches)
    return caches


def _extended(
    lm: LM, tokens: Int[np.ndarray, "R C"], start: int, step: int, caches: Any
) -> tuple[list[jax.Array], Any]:
    """Final hidden states of these tokens, which stand at `start`, and the caches with them."""
    states = []
    for begin in range(0, tokens.shape[1], step):
        chunk = tokens[:, begin : begin + step]
        positions = start + begin + np.arange(chunk.shape[1], dtype=np.int32)[None]
        positions = np.where(chunk >= 0, positions, -1)
        hidden, caches = lm.on_one_device.forward(
            jnp.asarray(np.maximum(chunk, 0)), jnp.asarray(positions), caches
        )
        states.append(hidden)
    return states, caches


@partial(jax.jit, static_argnums=0)
def _log_probs(spec, params, hidden):
    return jax.nn.log_softmax(heads.lm(spec, params, hidden), axis=-1)


def _branches(
    lm: LM, chunks: Sequence[Chunk], empty: Callable[..., Any], rows: int
) -> Iterator[tuple[list[int], int, Any]]:
    """Groups of prompts, how many chunks they share with the trunk, and caches that hold these."""
    shared = common_chunks(chunks)
    np.fill_diagonal(shared, 0)
    left = set(np.flatnonzero(shared.any(1)).tolist())
    while left:  # prompts that share nothing with a trunk have one of their own
        trunk = max(sorted(left), key=lambda row: sum(shared[row, member] for member in left))
        family = sorted(row for row in left if row == trunk or shared[trunk, row] > 0)
        left -= set(family)
        caches = empty()
        leaves = {row: int(shared[trunk, row]) for row in family if row != trunk}
        last = leaves[trunk] = max(leaves.values(), default=0)
        for begun in range(last + 1):
            leaving = [row for row in family if leaves[row] == begun]
            for start in range(0, len(leaving), rows):
                members = leaving[start : start + rows]
                yield members, begun, _copies(caches, len(members))
            if begun < last:
                (chunk,) = _of_rows(chunks[begun : begun + 1], [trunk])
                # As a prompt is read that an answer follows, so that one program serves both.
                _, caches = decoding.decode_step(lm, *chunk, caches, GREEDY, jax.random.key(0))
    alone = np.flatnonzero(~shared.any(1)).tolist()
    for start in range(0, len(alone), rows):
        members = alone[start : start + rows]
        yield members, 0, empty(rows=len(members))


def common_chunks(chunks: Sequence[Chunk]) -> Int[np.ndarray, "P P"]:
    """How many chunks every two prompts begin with alike, the last one aside: the answer is
    written after that.
    """
    known: dict[bytes, int] = {}
    names = np.array(
        [
            [known.setdefault(one.tobytes() + two.tobytes(), len(known)) for one, two in rows]
            for rows in (list(zip(*chunk, strict=True)) for chunk in chunks)
        ]
    )  # [chunks, P]: a number for what stands there
    alike = names[:-1, :, None] == names[:-1, None, :]
    return np.logical_and.accumulate(alike, axis=0).sum(0)


def _of_rows(chunks: Sequence[Chunk], rows: list[int]) -> list[Chunk]:
    return [(tokens[rows], positions[rows]) for tokens, positions in chunks]


@partial(jax.jit, static_argnums=1)
def _copies(caches: tuple[cache.Cache, ...], rows: int) -> tuple[cache.Cache, ...]:
    """Caches of one row as those of `rows` rows that have read the same, in memory of their own,
    which reading on uses up.
    """

    def repeated(x, axis):
        return jnp.broadcast_to(x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))

    return tuple(
        stored.updated(jax.tree.map(lambda x: repeated(x, 1), stored.kv), repeated(stored.pos, 0))
        for stored in caches
    )
