"""Attention on arrays, for a model of one's own: every policy that needs no hidden states."""

import dataclasses
import itertools
from collections.abc import Sequence
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
    layer, tokens = _layer(policy), q.shape[1]
    if layer.evict_every is None or tokens <= layer.evict_every:
        config, positions_of_rows = _config(encoding, q, scale, soft_cap), _positions(q, positions)
        run = forms.prefill(layer, config, positions_of_rows, implementation=implementation)
        return run(*map(jnp.asarray, (q, k, v)))
    if positions is not None:
        raise InputError(
            f"rows that evict every {layer.evict_every} tokens are read from position 0 on; give "
            f"no positions, or chunks that end where each row's turns do, to attend_stepwise"
        )
    starts = range(0, tokens, layer.evict_every)
    return attend_stepwise(
        q, k, v, layer, chunks=[min(layer.evict_every, tokens - start) for start in starts],
        encoding=encoding, scale=scale, soft_cap=soft_cap, implementation=implementation,
    )  # fmt: skip


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
    arrays, outs, start = (_positions(q, positions), q, k, v), [], 0
    # Before the prompt's end, then after it: chunks of one size in a row are one scan.
    split = 0 if prompt is None else ends.index(prompt) + 1
    parts = [itertools.groupby(part) for part in (chunks[:split], chunks[split:])]
    for size, count in [(size, len(list(same))) for part in parts for size, same in part]:
        ready = layer.needs_prompt or set(chunks[split:]) == {1}
        if prompt is not None and start == prompt and ready:
            room = tokens - prompt
            cache = forms.prepare_decoding(layer, config, cache, length=prompt, room=room)
            cache = cache.for_decoding()

        def read(carry, chunk, layout=cache.layout):
            (kv, pos), (new_pos, q, k, v) = carry, chunk
            step, pos = forms.extend(
                layer, config, layout, pos, new_pos, implementation=implementation
            )
            out, kv = step(q, k, v, kv, jnp.int32(0))
            return (kv, pos), out

        pieces = [x[:, start : start + count * size] for x in arrays]
        pieces = [x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1) for x in pieces]
        carry, out = jax.lax.scan(read, (cache.kv, cache.pos), pieces)
        cache, start = cache.updated(*carry), start + count * size
        outs.append(out.swapaxes(0, 1).reshape(batch, count * size, *q.shape[2:]))
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
