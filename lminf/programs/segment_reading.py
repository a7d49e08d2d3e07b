"""Reading a prompt in segments, and answering from those that make the model sure of itself.

    prompt = [head ; context ; question]
    H_n    = entropy of the next token after [head ; segment n ; question]
    answer = generate([head ; segments with low H, in the order of the text ; question])

Every pass is short, so no position is ever one that the model was not trained on, and no attention
is changed. What must be read together to answer has to stand in one segment. Entropy also is low
where a segment makes any continuation certain: repetition, boilerplate.
Source: XL3M (arXiv:2405.17755), whose code is not public; what its abstract leaves open is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lminf.errors import InputError
from lminf.lm.generate import GREEDY, Sampling
from lminf.lm.lm import LM
from lminf.lm.protocol import SequentialGenerator

BATCH_TOKENS = 8192  # tokens of segments read side by side: more of them is no faster on a CPU


@dataclass(frozen=True)
class TopK:
    """The `count` segments of the lowest entropy; None: as many as there is room for."""

    count: int | None = None

    def __post_init__(self):
        if self.count is not None and self.count < 1:
            raise InputError(f"top_k with count={self.count}: give at least 1 segment")

    def num_kept(self, ordered: Float[np.ndarray, " N"]) -> int:
        return len(ordered) if self.count is None else min(self.count, len(ordered))


@dataclass(frozen=True)
class Threshold:
    """Segments of at most this entropy, lowest first; the lowest of all even if it is above."""

    nats: float

    def num_kept(self, ordered: Float[np.ndarray, " N"]) -> int:
        return max(1, int((ordered <= self.nats).sum()))


Select: TypeAlias = TopK | Threshold
SELECTS: dict[str, type[Select]] = {"top_k": TopK, "threshold": Threshold}


@dataclass(frozen=True)
class SegmentReading:
    """How a prompt is cut and what of it is kept. All lengths are in tokens."""

    segment_len: int
    question_len: int  # the end of the prompt, read after every segment
    head_len: int = 0  # the start of the prompt, read before every segment: BOS, instructions
    overlap: int = 0  # of each segment with the one before it
    select: Select = TopK()
    entropy_position: Literal["last", "mean"] = "last"  # after the question, or over all of it

    def __post_init__(self):
        least = {"segment_len": 1, "question_len": 1, "head_len": 0, "overlap": 0}
        for field, smallest in least.items():
            if getattr(self, field) < smallest:
                raise InputError(f"{field}={getattr(self, field)}: give at least {smallest}")
        if self.overlap >= self.segment_len:
            raise InputError(
                f"overlap={self.overlap} of segments of {self.segment_len} tokens; "
                f"give less than the segment"
            )
        if self.entropy_position not in ("last", "mean"):
            raise InputError(f"entropy_position={self.entropy_position!r}; give 'last' or 'mean'")


@dataclass(frozen=True)
class KeyContext:
    """What was kept of a prompt, and why."""

    tokens: Int[np.ndarray, " T"]  # head, kept segments in order, question
    segments: tuple[tuple[int, int], ...]  # (start, stop) of every segment in the prompt
    entropies: Float[np.ndarray, " N"]  # nats, one a segment; 0 where none was asked for
    kept: tuple[int, ...]  # segments, rising


def segments(length: int, segment_len: int, overlap: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of pieces that cover `length` tokens; the last may be shorter."""
    step = segment_len - overlap
    starts = range(0, max(length - overlap, 1), step)
    return [(start, min(start + segment_len, length)) for start in starts] if length else []


def entropies(
    lm: LM, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
) -> Float[np.ndarray, " N"]:
    """Entropy (nats) of the next token after each prompt, or its mean over the `last` places."""
    longest = max(map(len, prompts), default=1)
    together = max(1, BATCH_TOKENS // longest)
    values = [
        np.asarray(_entropy(jnp.asarray(lm.logits(prompts[start : start + together], last=last))))
        for start in range(0, len(prompts), together)
    ]
    return np.concatenate(values) if values else np.zeros(0)


@jax.jit
def _entropy(logits: Float[Array, "N last V"]) -> Float[Array, " N"]:
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -(jnp.exp(log_p) * log_p).sum(-1).mean(-1)


def key_context(
    lm: LM, prompt: str | np.ndarray, how: SegmentReading, *, max_new_tokens: int
) -> KeyContext:
    """The part of a prompt to answer from: it and the answer fit in the model's trained length."""
    ids = lm.encode(prompt)[0] if isinstance(prompt, str) else np.asarray(prompt, np.int32)
    room, cut = lm.context_length - max_new_tokens, len(ids) - how.question_len
    fixed = how.head_len + how.question_len
    if cut < how.head_len:
        raise InputError(
            f"the prompt has {len(ids)} tokens but head_len={how.head_len} and question_len="
            f"{how.question_len} take {fixed}; shorten them or give a longer prompt"
        )
    if fixed + how.segment_len > room:
        raise InputError(
            f"head, segment and question take {fixed + how.segment_len} tokens, but this model was "
            f"trained at {lm.context_length} and the answer takes {max_new_tokens}; use "
            f"segment_len<={room - fixed}" if room > fixed else
            f"head and question take {fixed} tokens, but this model was trained at "
            f"{lm.context_length} and the answer takes {max_new_tokens}; shorten them"
        )  # fmt: skip
    return select_segments(lm, ids, how, room=room)


def select_segments(
    lm: LM, ids: Int[np.ndarray, " P"], how: SegmentReading, *, room: int
) -> KeyContext:
    """The key context of at most `room` tokens of a prompt with more tokens than head and question.

    A prompt that fits is kept whole, without a pass over its segments.
    """
    cut = len(ids) - how.question_len
    spans = tuple(
        (how.head_len + start, how.head_len + stop)
        for start, stop in segments(cut - how.head_len, how.segment_len, how.overlap)
    )
    if len(ids) <= room and (how.select == TopK() or len(spans) <= 1):
        return KeyContext(ids, spans, np.zeros(len(spans)), tuple(range(len(spans))))
    head, question = ids[: how.head_len], ids[cut:]
    unsure = entropies(
        lm,
        [np.concatenate([head, ids[start:stop], question]) for start, stop in spans],
        last=1 if how.entropy_position == "last" else how.question_len,
    )
    # Rounded, because the order of a batch changes the last digits: then the earlier one is first.
    order = np.argsort(np.round(unsure, 5), kind="stable")
    inside, kept = np.zeros(len(ids), bool), []
    inside[: how.head_len] = inside[cut:] = True
    for index in order[: how.select.num_kept(unsure[order])]:
        start, stop = spans[index]
        if inside.sum() + (~inside[start:stop]).sum() <= room:  # overlaps count once
            inside[start:stop] = True
            kept.append(int(index))
    return KeyContext(ids[inside], spans, unsure, tuple(sorted(kept)))


def generate(
    lm: LM,
    prompt: str | np.ndarray,
    how: SegmentReading,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> str:
    """What the model writes after the key context of a prompt of any length."""
    context = key_context(lm, prompt, how, max_new_tokens=max_new_tokens)
    answer = lm.generate(
        context.tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, seed=seed
    )
    assert isinstance(answer, str)  # one prompt, one text
    return answer


@dataclass(frozen=True)
class SegmentReader(SequentialGenerator):
    """Answers each prompt of a list from its key context, as evaluations ask it to."""

    lm: LM
    how: SegmentReading
    name: str = "segments"  # as rows call it

    def generate_one(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        """What the model writes after the key context of a prompt of any length."""
        return generate(self.lm, prompt, self.how, max_new_tokens=max_new_tokens, stop=stop)

    def attended_tokens(self, max_new_tokens: int) -> int:
        """The most tokens that an answer is written from, its own included."""
        select, how = self.how.select, self.how
        if not isinstance(select, TopK) or select.count is None:
            return self.lm.context_length
        kept = how.head_len + select.count * how.segment_len + how.question_len
        return min(self.lm.context_length, kept + max_new_tokens)
