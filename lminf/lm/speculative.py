"""Speculative decoding: a draft proposes tokens, and the model reads several of them in one call.

    propose   x_1 .. x_k, each drawn from a distribution q_i of the draft
    verify    one call of the model reads them: its own distributions p_1 .. p_(k+1)
    accept    x_1, x_2, … while a rule says so; in place of the first that is rejected a token of
              the rule's residual, and after the last one of p_(k+1)

Greedy answers are those of plain decoding, token by token. A call that reads several tokens rounds
otherwise than calls that read one, so its likeliest token counts only where its logit leads by more
than rounding changes (`ROUNDING`). Elsewhere the tokens so far are read once more as plain decoding
reads them, from caches that plain decoding would have: each at most once in an answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lminf import ranges
from lminf.attention import cache, decode, rope
from lminf.errors import InputError
from lminf.lm import generate
from lminf.lm.acceptance import RAPID, STANDARD, Rule, verify
from lminf.lm.generate import GREEDY, Caches, Sampling
from lminf.models import decoder, heads, layer_policies
from lminf.ranges import Range

Texts = Sequence[Int[np.ndarray, " _"]]  # the tokens of each row, its prompt and what follows
DRAFT_TOKENS = Range(min=1, max=1024)  # that are verified in one call
# How far a logit must lead, in units of the largest logit's rounding. Of 96 tokens that
# SmolLM2-135M read after 512, leads changed by at most 30 of them (float32, Intel Xeon).
ROUNDING = 256.0


# --- Drafts ---------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """The tokens that a draft proposes for each row."""

    tokens: Int[np.ndarray, "B k"]  # -1 behind what is proposed
    probs: Float[Array, "B k V"] | None = None  # they were drawn from; None: each was certain


class Drafter(Protocol):
    """The state of a draft during one generation."""

    def propose(self, texts: Texts, k: int, *, key: jax.Array) -> Proposal:
        """Up to k >= 1 tokens for each row. Between two calls a row has grown by the first tokens
        that were proposed, as many as were accepted, and one token; or it is complete.
        """
        ...


class Draft(Protocol):
    """A source of proposals: a model (lminf.lm.drafts), a text's own repetitions, counts."""

    def start(
        self, lm: Any, prompts: Texts, *, num_draft_tokens: int, max_new_tokens: int,
        sampling: Sampling,
    ) -> Drafter:  # fmt: skip
        """For rows that begin with these prompts and that the model `lm`, an lminf.LM, writes."""
        ...


@dataclass(frozen=True)
class Speculation:
    """How a model decodes with a draft."""

    draft: Draft
    num_draft_tokens: Annotated[int, DRAFT_TOKENS] = 7
    rule: Rule = STANDARD

    def __post_init__(self):
        ranges.check(self)


# --- Decoding -------------------------------------------------------------------------------------


class Round(NamedTuple):
    """The outcome of one verification by the target model."""

    tokens: list[Int[np.ndarray, " _"]]  # that each row goes on with
    drafted: int  # tokens, of all rows
    accepted: int
    target_calls: int  # of the model, those included that read tokens as plain decoding does


def generate_tokens(
    lm: Any,
    prompts: Texts,
    speculation: Speculation,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the next token of every row, as generate.generate_tokens does, -1 for rows that wait
    for others.
    """
    for each in rounds(
        lm, prompts, speculation, sampling=sampling, max_new_tokens=max_new_tokens, key=key
    ):
        for index in range(max(map(len, each.tokens))):
            yield np.array([row[index] if index < len(row) else -1 for row in each.tokens])


def rounds(
    lm: Any,
    prompts: Texts,
    speculation: Speculation,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
) -> Iterator[Round]:
    """Yields what follows the prompts, first one token of each row. `lm` is an lminf.LM."""
    _check(lm, speculation.rule, sampling)
    generate.check_new_tokens(max_new_tokens)
    texts = [np.asarray(each, np.int32) for each in prompts]
    turn = layer_policies.common_eviction(lm.decoder.policies)  # tokens, the most in a call
    k = speculation.num_draft_tokens
    k = k if turn is None else min(k, turn - 1)
    drafter = speculation.draft.start(
        lm, texts, num_draft_tokens=k, max_new_tokens=max_new_tokens, sampling=sampling
    )
    target = _Target(lm, texts, spare=k, room=max_new_tokens, sampling=sampling, key=key)
    ends = target.lengths + max_new_tokens
    new: list[Int[np.ndarray, " _"]] = list(target.next_token[:, None])
    drafted, accepted, number = 0, np.zeros(len(texts), np.int32), 0
    while True:
        calls, target.calls = target.calls, 0
        yield Round(new, drafted, int(accepted.sum()), calls)
        texts = [np.concatenate(pair) for pair in zip(texts, new, strict=True)]
        left = ends - np.array([len(text) for text in texts])
        if not left.any():
            return
        number += 1
        draft_key, target_key = jax.random.split(jax.random.fold_in(key, number))
        proposal = Proposal(np.full((len(texts), 0), -1))
        if (num_tokens := min(k, int(left.max()) - 1)) > 0:
            proposal = drafter.propose(texts, num_tokens, key=draft_key)
        tokens, probs = _padded(proposal, k)
        # The last token of an answer is not read, so none is proposed for its place; and rows that
        # are complete read nothing: -1.
        counts = np.minimum((tokens >= 0).sum(1), left - 1)
        counts = np.minimum(counts, target.most_drafted(texts)).astype(np.int32)
        accepted, following = target.verify(
            texts, Proposal(tokens, probs), counts, speculation.rule, target_key
        )
        drafted = int(np.maximum(counts, 0).sum())
        new = [
            np.append(row[:count], token)[:most].astype(np.int32)
            for row, count, token, most in zip(tokens, accepted, following, left, strict=True)
        ]


def _padded(proposal: Proposal, k: int) -> Proposal:
    """As of k tokens, so that one program serves all."""
    missing, probs = k - proposal.tokens.shape[1], proposal.probs
    tokens = np.pad(proposal.tokens, ((0, 0), (0, missing)), constant_values=-1).astype(np.int32)
    if probs is not None:
        probs = jnp.pad(probs, ((0, 0), (0, missing), (0, 0)))
    return Proposal(tokens, probs)


class _Target:
    """The model that is generated from: its caches, from which tokens can be taken back, and, where
    decoding is greedy, those that plain decoding would have.
    """

    def __init__(self, lm, prompts, *, spare, room, sampling, key):
        self.lm, self.sampling, self.calls = lm, sampling, 0
        # It reads several tokens in a call.
        self.together = lm.with_policy(layer_policies.one_by_one(lm.policy))
        read = read_prompts(lm, prompts, room=room, spare=spare, sampling=sampling, key=key)
        self.next_token, self.caches = read.next_token, read.rewindable
        self.lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        # What plain decoding has read, and the token it writes after that.
        self.plain: Caches = read.plain if sampling.temperature == 0 else ()
        self.plain_read, self.plain_next = self.lengths.copy(), self.next_token.copy()

    def verify(
        self,
        texts: Texts,
        proposal: Proposal,
        counts: Int[np.ndarray, " B"],
        rule: Rule,
        key: jax.Array,
    ) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """How many of the first `counts` tokens are accepted [B], and the tokens after them [B]."""
        tokens, before = proposal.tokens, self._sums()
        hidden, positions = self._read(texts, tokens, counts)
        if self.sampling.temperature == 0:
            accepted, following = self._verify_greedily(texts, tokens, counts, hidden)
        elif hidden.shape[1] == 1:
            args = self.lm.spec, self.lm.params, hidden, positions, self.sampling, key
            return np.zeros_like(counts), np.asarray(generate.next_token(*args))
        else:
            args = self.lm.spec, rule, self.lm.params, hidden, proposal.probs, tokens, counts
            accepted, following = map(np.asarray, _verified(*args, self.sampling, key))
        if before and (rejected := accepted < counts).any():
            self._take_back(before, rejected)
            self._read(texts, tokens, np.where(rejected, accepted, -1).astype(np.int32))
        return accepted, following

    def most_drafted(self, texts: Texts) -> Int[np.ndarray, " B"]:
        """Drafted tokens of each row that a call may read: none from where layers evict next."""
        read = np.array([len(text) - 1 for text in texts])
        turn = layer_policies.common_eviction(self.lm.decoder.policies)
        return np.full_like(read, DRAFT_TOKENS.max) if turn is None else turn - 1 - read % turn

    def _sums(self) -> dict[int, Any]:
        """Copies of the states, by layer, from which no token can be taken back."""
        policies = self.lm.decoder.policies
        pairs = enumerate(zip(policies, self.caches, strict=False))
        return {
            number: jax.tree.map(jnp.copy, layer.state)
            for number, (policy, layer) in pairs if policy.accumulates
        }  # fmt: skip

    def _take_back(self, before: dict[int, Any], rejected: Bool[np.ndarray, " B"]) -> None:
        """Puts the states of these rows back to what they were."""
        caches = list(self.caches)
        for number, state in before.items():
            kept = _kept(jnp.asarray(rejected), state, caches[number].state)
            caches[number] = dataclasses.replace(caches[number], state=kept)
        self.caches = tuple(caches)

    def _verify_greedily(self, texts, tokens, counts, hidden):
        best, certain = map(np.asarray, _leading(self.lm.spec, self.lm.params, hidden, ROUNDING))
        width, row = hidden.shape[1] - 1, np.arange(len(texts))
        agree = certain[:, :width] & (best[:, :width] == tokens[:, :width])
        agree &= np.arange(width)[None] < counts[:, None]
        accepted = np.cumprod(agree, axis=1).sum(1)
        following, unsure = best[row, accepted], ~certain[row, accepted] & (counts >= 0)
        if unsure.any():
            rows = zip(texts, tokens, accepted, strict=True)
            texts = [np.concatenate([text, drafted[:count]]) for text, drafted, count in rows]
            following = np.where(unsure, self._plain_next(texts, unsure), following)
        return accepted, following

    def _read(self, texts, tokens, counts):
        """Hidden states [B, C, D] of the last token of each text and of its drafted ones, and their
        positions.
        """
        width = tokens.shape[1] + 1 if (counts > 0).any() else 1
        lm = self.together if width > 1 else self.lm
        read = np.array([len(text) - 1 for text in texts], np.int32)
        last = np.array([text[-1:] for text in texts])
        chunk = np.maximum(np.concatenate([last, tokens], 1)[:, :width], 0).astype(np.int32)
        index = np.arange(width, dtype=np.int32)[None]
        positions = np.where(index <= counts[:, None], read[:, None] + index, -1)
        positions = positions.astype(np.int32)
        kept = np.where(counts >= 0, read, np.iinfo(np.int32).max)  # all of rows that read nothing
        caches = tuple(cache.rewound(layer, kept) for layer in self.caches)
        hidden, self.caches = lm.on_one_device.forward(chunk, positions, caches)
        self.calls += 1
        return hidden, positions

    def _plain_next(self, texts, rows: Bool[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """What plain decoding writes after the texts of these rows. Others read along."""
        lengths = np.array([len(text) for text in texts], np.int32)
        while (self.plain_read < lengths)[rows].any():
            reads = self.plain_read < lengths
            places = np.minimum(self.plain_read, lengths - 1)
            tokens = np.array([text[place] for text, place in zip(texts, places, strict=True)])
            positions = np.where(reads, self.plain_read, -1)
            token, self.plain = generate.decode_step(
                self.lm, tokens[:, None], positions[:, None], self.plain, GREEDY, jax.random.key(0)
            )
            self.plain_next = np.where(reads, np.asarray(token), self.plain_next)
            self.plain_read += reads
            self.calls += 1
        return self.plain_next


class Prompted(NamedTuple):
    """A model at the end of its prompts."""

    next_token: Int[np.ndarray, " B"]
    plain: Caches  # as plain decoding has them
    rewindable: Caches  # that read several tokens at a time, and from which they can be taken back


def read_prompts(
    lm: Any, prompts: Texts, *, room: int, spare: int, sampling: Sampling, key: jax.Array
) -> Prompted:
    """Reads prompts as generate.generate_tokens does; `room` tokens may follow, and `spare` of them
    be taken back. `lm` is an lminf.LM.
    """
    chunks, longest = list(generate.pieces(lm, prompts)), max(map(len, prompts))
    caches = generate.empty_caches(lm, rows=len(prompts), longest=longest, room=room)
    token, key = None, jax.random.split(key, room)[0]  # as decode_loop
    for tokens, positions in chunks:
        token, caches = generate.decode_step(lm, tokens, positions, caches, sampling, key)
    policies, configs = lm.decoder.policies, decoder.score_configs(lm.spec)
    copies = [
        None if policy.needs_prompt else _rewindable(policy, config, layer, spare)
        for policy, config, layer in zip(policies, configs, caches, strict=False)
    ]
    plain = generate.prepare_decoding(lm.decoder, caches, length=longest, room=room)
    rewindable = tuple(
        cache.rewindable(layer, spare) if copy is None else copy
        for copy, layer in zip(copies, plain, strict=True)
    )
    return Prompted(np.asarray(token), plain, rewindable)


def _rewindable(policy, config, layer, spare):
    rotated = _prerotated(policy, config, layer, spare=spare)
    if isinstance(rotated.layout, cache.PreRotated):
        return rotated.for_decoding(free=True)
    return cache.rewindable(layer, spare)


_prerotated = jax.jit(decode.prerotate, static_argnums=(0, 1), static_argnames="spare")


def _check(lm, rule, sampling) -> None:
    for policy in lm.decoder.policies:
        if policy.one_by_one is None:
            raise InputError(
                f"{policy.name} selects for several tokens that are read at once otherwise than "
                f"for one after another, so the answer would not be that of plain decoding; leave "
                f"the draft out, or use another policy, such as infllm or lm_infinite"
            )
    for encoding in lm.spec.encodings:
        if isinstance(encoding, rope.Rotary) and encoding.scaling.follows_length:
            raise InputError(
                f"{type(encoding.scaling).__name__} rotates keys anew with every token, so several "
                f"cannot be read at once as one after another; leave the draft out, or use NTKAware"
            )
    check_rule(rule, sampling.temperature)


def check_rule(rule: Rule, temperature: float) -> None:
    """Refuses a rule that means nothing at this temperature."""
    if isinstance(rule, RAPID) and temperature == 0:
        raise InputError(
            "RAPID shifts probabilities, but at temperature 0 nothing is drawn; give a temperature"
        )


@jax.jit
def _kept(rejected, before, after):
    """The state [L, B, ...] of rows from before, and of others that from after a call."""

    def of(old, new):
        return jnp.where(rejected.reshape(1, -1, *[1] * (new.ndim - 2)), old, new)

    return jax.tree.map(of, before, after)


@partial(jax.jit, static_argnums=(0, 1))
def _verified(spec, rule, params, hidden, probs, tokens, counts, sampling, key):
    logits = heads.lm(spec, params, hidden)
    flat = logits.reshape(-1, logits.shape[-1])
    p = generate.distribution(flat, sampling).reshape(logits.shape)
    tokens = jnp.maximum(tokens, 0)
    q = jax.nn.one_hot(tokens, p.shape[2], dtype=p.dtype) if probs is None else probs
    return verify(rule, p, q, tokens, counts, key=key)


@partial(jax.jit, static_argnums=0)
def _leading(spec, params, hidden, rounding):
    """The likeliest tokens [B, C], and whether each leads by more than rounding changes."""
    logits = heads.lm(spec, params, hidden)
    best = logits.argmax(-1).astype(jnp.int32)
    runners_up = jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    unit = jnp.finfo(hidden.dtype).eps * jnp.abs(logits).max(-1)
    return best, logits.max(-1) - runners_up.max(-1) > rounding * unit
