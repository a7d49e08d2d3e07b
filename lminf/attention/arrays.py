"""Attention on arrays, for a model of one's own: every policy that needs no hidden states."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lminf.attention import attend as forms
from lminf.attention import cache as caches
from lminf.attention.parsing import parse_policy
from lminf.attention.policy import AnyPolicy, LayerPolicy, PerLayer
from lminf.attention.rope import Encoding, Rotary
from lminf.attention.scores import ScoreConfig
from lminf.errors import InputError

Arrays: TypeAlias = Array | np.ndarray
ROTARY = Rotary(base=10_000.0)


def attend(
    q: Float[Arrays, "B T N H"],
    k: Float[Arrays, "B T K H"],
    v: Float[Arrays, "B T K H"],
    policy: AnyPolicy | str,
    *,
    encoding: Encoding = ROTARY,
    positions: Int[Arrays, "#B T"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention outputs of a text read at once, under a policy or its text (`"lm_infinite:…"`).

    q and k are as projected: nothing is rotated yet. The encoding places them; a Rotary without
    `dim` rotates all channels. `positions` rise by one along a row and are below 0 for padding at
    its start; None: 0, 1, …. `scale` of the scores: None is H^-1/2. Options that count layers
    (`from_layer`, `dense_layers`) see the first one.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    layer, config = _layer(policy), _config(encoding, q, scale, soft_cap)
    tokens = q.shape[1]
    if layer.evict_every is not None and tokens > layer.evict_every:
        chunks = _evictions(layer.evict_every, tokens, positions)
        return attend_stepwise(
            q, k, v, layer, chunks=chunks, encoding=encoding, positions=positions, scale=scale,
            soft_cap=soft_cap, implementation=implementation,
        )  # fmt: skip
    run = forms.prefill(layer, config, _positions(q, positions), implementation=implementation)
    return run(q, k, v)


def attend_stepwise(
    q: Float[Arrays, "B T N H"],
    k: Float[Arrays, "B T K H"],
    v: Float[Arrays, "B T K H"],
    policy: AnyPolicy | str,
    *,
    chunks: Sequence[int],
    prompt: int | None = None,
    encoding: Encoding = ROTARY,
    positions: Int[Arrays, "#B T"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """As `attend`, through a cache: `chunks` tokens at a time, which sum to T; ones decode.

    After the first `prompt` tokens, which end a chunk, the cache is made ready for decoding: a
    prompt is compressed by policies that do so, and those cannot do without.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    layer, config = _layer(policy), _config(encoding, q, scale, soft_cap)
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    ends = list(itertools.accumulate(chunks))
    if not ends or ends[-1] != tokens or min(chunks) < 1:
        raise InputError(
            f"chunks sum to {sum(chunks)} of {tokens} tokens; give all, 1 or more each"
        )
    if layer.needs_prompt and prompt is None:
        raise InputError(
            f"{layer.name} acts at the end of a prompt; say where that is with prompt="
        )
    if prompt is not None and prompt not in ends:
        raise InputError(f"prompt={prompt} ends none of the chunks; they end at {ends}")
    shape = caches.CacheShape(batch, tokens, heads, kv_heads, width, k.dtype)
    cache = caches.create(layer, shape, layers=1)
    all_positions, outs, start = _positions(q, positions), [], 0
    # Before the prompt's end, then after it: chunks of one size in a row are one scan.
    split = 0 if prompt is None else ends.index(prompt) + 1
    for count, size in _runs(chunks[:split], chunks[split:]):
        ready = layer.needs_prompt or set(chunks[split:]) == {1}
        if prompt is not None and start == prompt and ready:
            cache = forms.prepare_decoding(
                layer, config, cache, length=prompt, room=tokens - prompt
            )
            cache = cache.for_decoding()

        def read(carry, chunk, layout=cache.layout):
            kv, pos = carry
            step, pos = forms.extend(
                layer, config, layout, pos, chunk[0], implementation=implementation
            )
            out, kv = step(chunk[1], chunk[2], chunk[3], kv, jnp.int32(0))
            return (kv, pos), out

        def cut(x, start=start, count=count, size=size):
            x = x[:, start : start + count * size]
            return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

        (kv, pos), out = jax.lax.scan(
            read, (cache.kv, cache.pos), [cut(x) for x in (all_positions, q, k, v)]
        )
        cache = cache.updated(kv, pos)
        outs.append(out.swapaxes(0, 1).reshape(batch, count * size, *q.shape[2:]))
        start += count * size
    return jnp.concatenate(outs, 1)


def _layer(policy: AnyPolicy | str) -> LayerPolicy:
    policy = parse_policy(policy)
    if isinstance(policy, PerLayer):
        raise InputError(f"{policy.name} is of several layers; give the policy of one")
    if policy.needs_hidden:
        raise InputError(f"{policy.name} goes by what a model makes of its tokens; use lminf.LM")
    return policy


def _config(encoding: Encoding, q, scale, soft_cap) -> ScoreConfig:
    width = q.shape[3]
    if isinstance(encoding, Rotary) and encoding.dim is None:
        encoding = dataclasses.replace(encoding, dim=width)
    return ScoreConfig(encoding, width**-0.5 if scale is None else scale, soft_cap)


def _positions(q, positions) -> Int[Array, "B T"]:
    if positions is None:
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return jnp.broadcast_to(jnp.asarray(positions, jnp.int32), q.shape[:2])


def _evictions(every: int, tokens: int, positions) -> list[int]:
    if positions is not None:
        raise InputError(
            f"rows that evict every {every} tokens are read from position 0 on; give no positions, "
            f"or chunks that end where each row's turns do, to attend_stepwise"
        )
    return [min(every, tokens - start) for start in range(0, tokens, every)]


def _runs(*parts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(how many, size) of equal chunks in a row."""
    for part in parts:
        for size, same in itertools.groupby(part):
            yield len(list(same)), size
