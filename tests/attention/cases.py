"""What the attention tests share: policies, encodings, arrays, and functions that run a policy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lminf.attention import attend, cache, rope, scores
from lminf.attention import reference as dense
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)

ATOL = 3e-6  # float32, outputs of order 1
BATCH, TOKENS, KV_HEADS, WIDTH = 2, 24, 2, 8

POLICIES = {
    "full": Full(),
    "window": Window(5),
    "lambda": Lambda(6, 3),
    "lm_infinite": LMInfinite(5, 3),
    "lm_infinite_distance": LMInfinite(6, 3, distance=4),
    "streaming": Streaming(5, 3),
    "rerope": ReRoPE(5),
    "rerope_log": ReRoPE(6, log_from=9),
    "leaky": LeakyReRoPE(5, 4, log_from=9),
    "self_extend": SelfExtend(5, 3),
    "per_head_bounded": PerHead((LMInfinite(7, 2), Streaming(4, 3))),
    "per_head_mixed": PerHead((SelfExtend(5, 2), LMInfinite(6, 3))),
}
HALF = rope.Rotary(100.0, 8, "half")
ENCODINGS = {
    "rotary": HALF,
    "partial": rope.Rotary(100.0, 4, "interleaved"),
    "alibi": rope.Alibi(8.0),
    "none": rope.NoEncoding(),
    "yarn": rope.Rotary(100.0, 8, "half", rope.YaRN(4.0, 12)),
    "partial_yarn": rope.Rotary(100.0, 4, "half", rope.YaRN(4.0, 12)),
}
# Two sets of (policy, encoding, GQA ratio) with every policy once and every encoding several times.
_ENCODINGS = ("rotary", "partial", "alibi", "none", "yarn")
_PRODUCT = [
    (policy, encoding, (1, 3)[(i + j) % 2])
    for i, policy in enumerate(POLICIES)
    for j, encoding in enumerate(_ENCODINGS)
]
COVER = [case for i, case in enumerate(_PRODUCT) if i % 5 == i // 5 % 5]
OTHERS = [(p, e, 4 - g) for i, (p, e, g) in enumerate(_PRODUCT) if i % 5 == (i // 5 + 2) % 5]


def scoring(encoding: str, *, soft_cap: float | None = None) -> scores.ScoreConfig:
    return scores.ScoreConfig(ENCODINGS[encoding], WIDTH**-0.5, soft_cap)


def arrays(group: int, *, tokens: int = TOKENS, kv_heads: int = KV_HEADS):
    """q, k, v: the scores are of order 2, so that a wrong distance shows."""
    rng = np.random.default_rng(0)
    heads = (group * kv_heads, kv_heads, kv_heads)
    q, k, v = (rng.normal(size=(BATCH, tokens, n, WIDTH)).astype(np.float32) for n in heads)
    return 1.5 * q, 1.5 * k, v


def padded(pads=(0, 4), tokens: int = TOKENS) -> np.ndarray:
    """Positions [B, T] of rows that begin with so many tokens of padding."""
    return (np.arange(tokens) - np.array(pads)[:, None]).astype(np.int32)


# --- Compiling fast -------------------------------------------------------------------------------

# Tests compile much and compute little: without optimisation, and with the older fusion code
# generator, a graph takes a third of the time. Semantics are the same.
_FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def fast_options() -> dict:
    try:
        jax.jit(lambda x: x + 1, compiler_options=_FAST)(0)
    except jax.errors.JaxRuntimeError:  # another XLA, without these options
        return {}
    return _FAST


def compiled(function):
    return jax.jit(function, compiler_options=fast_options())


# --- Running a policy -----------------------------------------------------------------------------


def reference(policy, scoring, positions, segments=None):
    positions = jnp.asarray(positions)
    return functools.partial(
        dense.reference, policy, scoring, positions=positions, segments=segments
    )


def chunks(policy, scoring, positions, sizes, *, implementation, capacity: int | None = None):
    """(q, k, v) -> outputs, the cache's `pos` at the end and what it holds, when read in chunks of
    these sizes.

    Chunks of one size in a row are one scan, so they compile once.
    """
    capacity = capacity or positions.shape[1]
    layout = cache.layout_for(policy, capacity)

    def run(q, k, v):
        shape = cache.CacheShape(q.shape[0], capacity, q.shape[2], *k.shape[2:], k.dtype)
        empty = cache.create(policy, shape, layers=2)

        def read(carry, chunk):
            held, stored_pos = carry
            at, *new = chunk
            step, stored_pos = attend.extend(
                policy, scoring, layout, stored_pos, at, implementation=implementation
            )
            out, held = step(*new, held, 1)
            return (held, stored_pos), out

        carry, outs, start = (empty.kv, empty.pos), [], 0
        for size, same in itertools.groupby(sizes):
            count = len(list(same))
            piece = slice(start, start := start + count * size)

            def cut(x, piece=piece, count=count, size=size):
                x = x[:, piece]
                return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

            carry, out = jax.lax.scan(
                read, carry, [cut(x) for x in (jnp.asarray(positions), q, k, v)]
            )
            out = out.swapaxes(0, 1)
            outs.append(out.reshape(out.shape[0], -1, *out.shape[3:]))
        return jnp.concatenate(outs, 1), carry[1], carry[0]

    return run


def with_gradients(function):
    """(q, k, v, ct) -> (output, gradients of <output, ct>)."""

    def both(q, k, v, ct):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(ct)

    return both
