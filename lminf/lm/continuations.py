"""How likely continuations of a prompt are, under policies for which writing is not reading: those
that act at the end of a prompt, and those whose queries select in groups where they are read.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from lminf.attention.policy import LayerPolicy
from lminf.attention.sparse import SparsePolicy
from lminf.lm import generate
from lminf.models import heads, layer_policies

PIECE = 16  # tokens of a continuation that are read together
_logits = jax.jit(heads.lm, static_argnums=0)


def log_probs(
    lm: Any, prompt: Int[np.ndarray, " P"], continuations: Sequence[Int[np.ndarray, " _"]]
) -> Iterator[Float32[np.ndarray, "_ V"]]:
    """Log-probabilities (nats) at each token of every continuation of a prompt, as if they were
    written: after what a policy keeps at the end of the prompt, and each selecting by itself.
    """
    if not any(policy.needs_prompt or _selects(policy) for policy in lm.decoder.policies):
        for tokens in continuations:
            text = np.concatenate([prompt, tokens[:-1]])
            logits = generate.next_logits(lm, [text], last=len(tokens))[0]
            yield np.asarray(jax.nn.log_softmax(logits, axis=-1))
        return
    longest = max(map(len, continuations))
    lm.check_length(len(prompt) + longest)
    capacity = -(-(len(prompt) + longest + PIECE) // generate.STEP) * generate.STEP
    caches = lm.on_one_device.init_caches(batch=1, capacity=capacity)
    last: Any = None
    for tokens, positions in generate.pieces(lm, [prompt]):
        read, caches = lm.on_one_device.forward(tokens, positions, caches)
        last = read[:, positions[0].argmax()][:, None]  # padding may follow
    yield from after_prompt(lm, last, caches, len(prompt), continuations)


def after_prompt(
    lm: Any,
    last: Float[Array, "1 1 D"],
    caches: generate.Caches,
    length: int,
    continuations: Sequence[Int[np.ndarray, " _"]],
) -> Iterator[Float32[np.ndarray, "_ V"]]:
    """As `log_probs`, of a prompt of `length` tokens: the final hidden state of the last one, and
    the caches that hold it, with room for PIECE more tokens than come. They are used up.
    """
    policies, step, reader = lm.decoder.policies, PIECE, lm.on_one_device
    if any(policy.needs_prompt or policy.one_by_one is None for policy in policies):
        room = max(map(len, continuations)) + PIECE
        caches = generate.prepare_decoding(lm.decoder, caches, length=length, room=room)
        step = 1 if any(map(_selects, policies)) else PIECE
    else:
        reader = reader.with_policy(layer_policies.one_by_one(lm.policy))
    if layer_policies.common_eviction(policies):  # no piece may cross a boundary
        step = 1
    for tokens in continuations:
        # The prompt predicts the first token, so one alone reads nothing.
        states, after = [last], jax.tree.map(jnp.copy, caches) if len(tokens) > 1 else caches
        for start in range(0, len(tokens) - 1, step):
            piece = np.zeros((1, step), np.int32)
            piece[0, : len(tokens) - start] = tokens[start : start + step]
            places = np.arange(start, start + step, dtype=np.int32)[None]
            positions = np.where(places < len(tokens), length + places, -1)
            hidden, after = reader.forward(piece, positions, after)
            states.append(hidden)
        logits = _logits(lm.spec, lm.params, jnp.concatenate(states, axis=1)[:, : len(tokens)])
        yield np.asarray(jax.nn.log_softmax(logits[0], axis=-1))


def _selects(policy: LayerPolicy) -> bool:
    return isinstance(policy, SparsePolicy)
