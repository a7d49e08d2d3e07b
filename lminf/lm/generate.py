"""Generation: tokens one at a time through the cache, and text out of tokens."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from lminf.attention import attend, cache
from lminf.attention.context_parallel import shares_slots
from lminf.attention.policy import LayerPolicy
from lminf.attention.scores import ScoreConfig
from lminf.errors import InputError
from lminf.models import decoder, heads
from lminf.models.layer_policies import chunk_within, common_eviction, last_alone
from lminf.models.spec import ModelSpec
from lminf.types import Params

Caches: TypeAlias = tuple[cache.Cache, ...]
Forward: TypeAlias = Callable[[Array, Array, Caches], tuple[Array, Caches]]

ROUND = 64  # tokens: what is kept of a prompt, and the room after it, grow by this
CONTEXT = "context"  # the mesh axis that the tokens of a chunk are spread over
STEP = 512  # tokens: unbounded caches and padded prompts grow by this, so few shapes are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature=0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None  # draw among the k most likely
    top_p: float | None = None  # draw among the fewest that hold this probability

    def __post_init__(self):
        if not self.temperature >= 0:  # NaN too
            raise InputError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: give at least 1 token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: give a probability in (0, 1]")


GREEDY = Sampling()


def _numbers_again(top_k, numbers) -> Sampling:
    sampling = object.__new__(Sampling)  # numbers of a compiled program have no values to check
    temperature, top_p = numbers
    vars(sampling).update(temperature=temperature, top_k=top_k, top_p=top_p)
    return sampling


# One compiled step serves all temperatures and all top_p; top_k is a size, so each has its own.
jax.tree_util.register_pytree_node(
    Sampling, lambda s: ((s.temperature, s.top_p), s.top_k), _numbers_again
)


def sample(logits: Float[Array, "B V"], sampling: Sampling, *, key: jax.Array) -> Int[Array, " B"]:
    """The next token of each row."""
    return jax.lax.cond(
        sampling.temperature == 0,
        lambda: logits.argmax(-1).astype(jnp.int32),
        lambda: _draw(logits, sampling, key),
    )


def distribution(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The probabilities by which `sample` draws."""

    def drawn():
        kept, ids = _candidates(logits, sampling)
        probs = jax.nn.softmax(kept, axis=-1)
        if ids is None:
            return probs
        row = jnp.arange(len(ids), dtype=jnp.int32)[:, None]
        return jnp.zeros_like(logits).at[row, ids].set(probs)

    return jax.lax.cond(
        sampling.temperature == 0,
        lambda: jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype),
        drawn,
    )


def _draw(logits, sampling, key):
    kept, ids = _candidates(logits, sampling)
    drawn = jax.random.categorical(key, kept).astype(jnp.int32)
    if ids is None:
        return drawn
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)


def _candidates(logits, sampling):
    """Tempered logits, -inf for what is not drawn, and the tokens that they are of; None: of all,
    in their order.
    """
    # The largest becomes 0, so that no temperature, however small, makes two of them infinite; and
    # one that float32 cannot tell from 0 must not divide 0 by 0.
    temperature = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature.astype(logits.dtype)
    if sampling.top_k is None and sampling.top_p is None:
        return logits, None
    # Places in the order of likelihood, not thresholds: equal logits must not make the set larger.
    size = logits.shape[-1]
    ordered, ids = jax.lax.top_k(logits, min(sampling.top_k or size, size))
    if sampling.top_p is not None:
        chances = jax.nn.softmax(ordered, axis=-1)
        # A token stays when those before it hold less than top_p: the first always does.
        inside = jnp.cumsum(chances, axis=-1) - chances < sampling.top_p
        ordered = jnp.where(inside, ordered, -jnp.inf)
    return ordered, ids


def generate_tokens(
    lm: Any,
    prompts: Sequence[Int[np.ndarray, " _"]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the next token of every row, up to max_new_tokens times. `lm` is an lminf.LM.

    Prompts of unequal length are padded on the left with negative positions, which nothing sees.
    """
    chunks = list(pieces(lm, prompts))
    check_new_tokens(max_new_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    caches = empty_caches(lm, rows=len(prompts), longest=int(lengths.max()), room=max_new_tokens)
    yield from decode_loop(
        lm, chunks, caches, lengths=lengths, sampling=sampling, max_new_tokens=max_new_tokens,
        key=key,
    )  # fmt: skip


def check_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: give at least 1")


def decode_loop(
    lm: Any,
    chunks: Sequence[tuple[Int[np.ndarray, "B _"], Int[np.ndarray, "B _"]]],
    caches: tuple[Any, ...],
    *,
    lengths: Int[np.ndarray, " B"],
    sampling: Sampling,
    max_new_tokens: int,
    key: jax.Array,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Reads the last chunks of prompts of `lengths` tokens into these caches, which are used up,
    and yields the next token of every row, max_new_tokens times.
    """
    keys, token = jax.random.split(key, max_new_tokens), jnp.zeros(len(lengths), jnp.int32)
    for tokens, positions in chunks:
        token, caches = decode_step(lm, tokens, positions, caches, sampling, keys[0])
    caches = prepare_decoding(lm.decoder, caches, length=int(lengths.max()), room=max_new_tokens)
    for count in range(max_new_tokens):
        yield np.asarray(token)
        if count + 1 < max_new_tokens:
            token, caches = decode_step(
                lm, token[:, None], (lengths + count)[:, None], caches, sampling, keys[count + 1]
            )  # fmt: skip


def next_logits(
    lm: Any, prompts: Sequence[Int[np.ndarray, " _"]], *, last: int = 1
) -> Float32[np.ndarray, "B last V"]:
    """Logits of what follows each of the `last` tokens of every prompt. `lm` is an lminf.LM."""
    if not 1 <= last <= min((len(prompt) for prompt in prompts), default=1):
        raise InputError(
            f"last={last}: give at least 1, and no more than the shortest prompt has tokens"
        )
    states = np.zeros((len(prompts), last, lm.spec.width), np.float32)
    for hidden, positions in _hidden_states(lm, prompts):
        hidden = np.asarray(hidden, np.float32)
        for row, position in enumerate(positions):
            states[row] = np.concatenate([states[row], hidden[row][position >= 0]])[-last:]
    return np.asarray(_logits(lm.spec, lm.params, jnp.asarray(states, lm.dtype)))


def mean_hidden(lm: Any, prompts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "B D"]:
    """The mean over every prompt's tokens of the final hidden states. `lm` is an lminf.LM."""
    total = np.zeros((len(prompts), lm.spec.width), np.float64)
    for hidden, positions in _hidden_states(lm, prompts):
        mask = positions >= 0
        total += np.asarray(_pool(hidden, jnp.asarray(mask))) * mask.sum(1, keepdims=True)
    return (total / [[len(prompt)] for prompt in prompts]).astype(np.float32)


def _hidden_states(
    lm: Any, prompts: Sequence[Int[np.ndarray, " _"]]
) -> Iterator[tuple[Float[Array, "B C D"], Int[np.ndarray, "B C"]]]:
    """Final hidden states of one chunk after another, and the positions (below 0: padding)."""
    chunks = list(pieces(lm, prompts))
    caches = empty_caches(lm, rows=len(prompts), longest=max(map(len, prompts)), room=0)
    for tokens, positions in chunks:
        hidden, caches = lm.on_one_device.forward(tokens, positions, caches)
        yield hidden, positions


def pieces(
    lm: Any, prompts: Sequence[Int[np.ndarray, " _"]]
) -> Iterator[tuple[Int[np.ndarray, "B C"], Int[np.ndarray, "B C"]]]:
    """(tokens, positions) of one chunk after another. All rows end together, and their last tokens
    are a chunk of their own where the policy reads them alone. Where it evicts every so many
    tokens, all begin with a chunk, and end within the last.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or not lengths.min():
        raise InputError("a prompt has no tokens; give at least one")
    longest = int(lengths.max())
    chunk = STEP if longest > STEP else max(16, 1 << (longest - 1).bit_length())
    chunk = 4 * STEP if longest > 16 * STEP else chunk
    evict_every = common_eviction(lm.decoder.policies)
    chunk = chunk_within(evict_every, chunk)
    width = -(-longest // chunk) * chunk
    padded = np.zeros((len(prompts), width), np.int32)
    first = width - (lengths if evict_every is None else -(-lengths // chunk) * chunk)
    for row, prompt in enumerate(prompts):
        padded[row, first[row] : first[row] + len(prompt)] = prompt
    positions = np.arange(width, dtype=np.int32)[None] - first[:, None].astype(np.int32)
    positions = np.where(positions < lengths[:, None], positions, -1).astype(np.int32)
    last = positions[:, -1:].copy()
    alone = last_alone(lm.decoder.policies)
    if alone:  # as wide as the others, so that no other shape is compiled
        positions[:, -1] = -1
    for start in range(0, width, chunk):
        yield padded[:, start : start + chunk], positions[:, start : start + chunk]
    if alone:
        yield padded[:, -1:], last


def empty_caches(lm: Any, *, rows: int, longest: int, room: int) -> tuple[cache.Cache, ...]:
    """Caches of prompts of at most `longest` tokens, and `room` more after each."""
    lm.check_positions(longest + max(room - 1, 0))  # the last one is written and not read
    capacity = -(-(longest + room) // STEP) * STEP
    return lm.on_one_device.init_caches(batch=rows, capacity=capacity)


def decode_step(
    lm: Any,
    tokens: Int[Array | np.ndarray, "B C"],
    positions: Int[Array | np.ndarray, "B C"],
    caches: Caches,
    sampling: Sampling,
    key: jax.Array,
) -> tuple[Int[Array, " B"], Caches]:
    """The token after these [B, C], which stand at `positions` [B, C]; and the caches, of which
    those given are used up. `lm` is an lminf.LM.
    """
    hidden, caches = lm.on_one_device.forward(tokens, positions, caches)
    return next_token(lm.spec, lm.params, hidden, positions, sampling, key), caches


@partial(jax.jit, static_argnums=0)
def next_token(
    spec: ModelSpec,
    params: Params,
    hidden: Float[Array, "B C D"],
    positions: Int[Array, "B C"],
    sampling: Sampling,
    key: jax.Array,
) -> Int[Array, " B"]:
    """The token after the last of these that is none of padding."""
    last = hidden[jnp.arange(len(hidden)), positions.argmax(1)]
    return sample(heads.lm(spec, params, last), sampling, key=key)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def forward(
    module: decoder.Decoder,
    mesh: Mesh | None,
    params: Params,
    tokens: Int[Array, "B C"],
    positions: Int[Array, "B C"],
    caches: tuple[cache.Cache, ...],
) -> tuple[Float[Array, "B C D"], tuple[cache.Cache, ...]]:
    """LM.forward by Decoder.apply, its layers scanned. On a mesh, the tokens of a chunk are spread
    over its devices where they divide it.
    """
    shared = mesh is not None and tokens.shape[1] % mesh.size == 0
    module = module.clone(context_axis=CONTEXT if shared else None)

    def run(params, tokens, positions, caches) -> Any:
        return module.apply({"params": params}, tokens, positions=positions, caches=caches)

    if mesh is not None and shared:
        shares, of_caches = P(None, CONTEXT), cache_specs(caches, mesh)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), shares, shares, of_caches),
            out_specs=(shares, of_caches),
            # That all devices end with the same windows, jax cannot know: it follows from the
            # gathered keys and values that each of them writes.
            check_vma=False,
        )
    return run(params, tokens, positions, caches)


def cache_specs(caches: Caches, mesh: Mesh) -> Caches:
    """The PartitionSpec of each array of the caches of a text that is read on this mesh."""

    def specs(layer: cache.Cache) -> cache.Cache:
        everywhere = jax.tree.map(lambda x: P(), layer)
        if not shares_slots(layer.layout, mesh.size):
            return everywhere
        by_slot: Any = P(None, None, CONTEXT)
        return dataclasses.replace(everywhere, k=by_slot, v=by_slot)

    return tuple(specs(layer) for layer in caches)


@lru_cache(maxsize=64)
def empty_on(
    mesh: Mesh, spec: ModelSpec, policies: tuple[LayerPolicy, ...], batch: int, capacity: int,
    dtype: Any,
) -> Callable[[], Caches]:  # fmt: skip
    """The program of decoder.init_caches that makes on each device of a mesh what it holds."""
    make = partial(decoder.init_caches, spec, policies, batch=batch, capacity=capacity, dtype=dtype)
    specs = cache_specs(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=jax.tree.map(partial(NamedSharding, mesh), specs))


def prepare_decoding(
    module: decoder.Decoder, caches: tuple[cache.Cache, ...], *, length: int, room: int
) -> tuple[cache.Cache, ...]:
    """The caches at the end of prompts: attend.prepare_decoding, compiled for few lengths."""
    configs, prepared = decoder.score_configs(module.spec), []
    # Caches may be of one period.
    for policy, config, layer in zip(module.policies, configs, caches, strict=False):
        if policy.needs_prompt:
            sizes = (-(-tokens // ROUND) * ROUND for tokens in (length, room))
            prepared.append(_compress(policy, config, layer, *sizes))
            continue
        # Of caches that keep every token, which may fill the memory, no copy is made.
        rotate = _prerotate_in_place if layer.layout.keeps_all else _prerotate
        rotated = rotate(policy, config, layer)
        prepared.append(rotated.for_decoding(free=True))
    return tuple(prepared)


def _prepare(policy: LayerPolicy, config: ScoreConfig, layer: cache.Cache, length=0, room=0):
    return attend.prepare_decoding(policy, config, layer, length=length, room=room)


_prerotate = jax.jit(_prepare, static_argnums=(0, 1))
_prerotate_in_place = jax.jit(_prepare, static_argnums=(0, 1), donate_argnums=2)
_compress = jax.jit(_prepare, static_argnums=(0, 1, 3, 4))  # it comes out smaller: none is donated
_logits = jax.jit(heads.lm, static_argnums=0)
_pool = jax.jit(heads.embed)


class TextStream:
    """Turns one row's tokens into text that is safe to show: whole characters, no stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._decoder = tokenizer.incremental()
        self._ends = frozenset(tokenizer.eos_ids)
        self._stop = tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s)
        self._held = ""
        self.done = False

    def feed(self, token: int) -> str:
        """The text that may now be shown."""
        if self.done:
            return ""
        if token in self._ends:
            return self.finish()
        self._held += self._decoder.feed(token)
        if self._cut():
            return self._held
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        ready, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return ready

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.done:
            return ""
        self.done = True
        self._held += self._decoder.finish()
        self._cut()
        return self._held

    def _cut(self) -> bool:
        """Whether a stop string is there; it and what follows are then gone, and this is done."""
        starts = [start for start in (self._held.find(s) for s in self._stop) if start >= 0]
        if starts:
            self.done, self._held = True, self._held[: min(starts)]
        return bool(starts)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
