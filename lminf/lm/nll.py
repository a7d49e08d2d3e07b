"""How well a text is predicted: its tokens, read in chunks through the caches."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int

from lminf.errors import InputError
from lminf.lm.generate import CONTEXT, prepare_decoding
from lminf.models import layer_policies
from lminf.models.spec import ModelSpec
from lminf.objectives import cross_entropy

CHUNK = 2048  # tokens read at a time: wide enough for full-speed products, small beside a window
# The same on a CPU under policies of positions that keep every token: XLA's library for small
# products holds what it computed of a head over all of them. After 16,384 tokens of SmolLM2-135M
# the peak is 1.97 GB, not 2.19, and reading takes 5 % longer (AMD EPYC).
UNBOUNDED_CHUNK = 1024
AFTER_PROMPT = 128  # the same, once a prompt is compressed: scores of a chunk are held whole


def bits_per_byte(token_nll: Float[np.ndarray, "..."], num_bytes: float) -> float:
    """Bits per byte of UTF-8 text: of the NLL (nats) of tokens that stand for so many bytes.

    Comparable between vocabularies, which NLL per token is not.
    """
    if not num_bytes > 0:
        raise InputError("the scored tokens stand for no text; give more than special tokens")
    return float(np.sum(token_nll, dtype=np.float64) / np.log(2) / num_bytes)


@dataclass(frozen=True)
class NLL:
    """How well a text was predicted."""

    token_nll: Float32[np.ndarray, " T-1"]  # nats of tokens 1.. given all before them
    token_bytes: Int[np.ndarray, " T-1"]  # UTF-8 bytes of those tokens

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.token_nll.mean(dtype=np.float64))

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.token_nll, int(self.token_bytes.sum()))

    def blocks(self, block: int) -> list[float]:
        """Mean nats per token over each `block` positions of the text; the first token has none."""
        starts = range(0, len(self.token_nll) + 1, block)
        parts = (self.token_nll[max(start - 1, 0) : start - 1 + block] for start in starts)
        return [float(part.mean(dtype=np.float64)) for part in parts if len(part)]


def stream_nll(
    lm: Any,
    pieces: Iterable[Int[np.ndarray, " _"]],
    *,
    longest: int | None = None,
    prompt: int | None = None,
) -> Iterator[Float32[np.ndarray, " _"]]:
    """LM.stream_nll: the chunks of a stream, read through the caches of `lm`, an lminf.LM."""
    if lm.mesh is not None and not all(p.context_parallel for p in lm.decoder.policies):
        # Which tokens are selected follows from all that came before: one device reads them.
        alone = dataclasses.replace(lm, mesh=None)
        yield from stream_nll(alone, pieces, longest=longest, prompt=prompt)
        return
    module, mesh = lm.decoder, lm.mesh
    bounded = all(policy.bounded for policy in module.policies)
    if longest is None and not bounded:
        raise InputError(
            f"{lm.policy.name} keeps every token, so a stream needs longest=, the tokens to "
            f"make room for; or read it under a policy with a window"
        )
    if longest is not None:
        lm.check_positions(longest - 1)
    chunk, by_position = CHUNK, all(policy.context_parallel for policy in module.policies)
    if by_position and not bounded and jax.default_backend() == "cpu":
        chunk = min(CHUNK, UNBOUNDED_CHUNK)
    if longest is not None:
        # No wider than the text, in powers of two, so that few shapes are compiled.
        chunk = min(chunk, max(16, _power_of_two(longest - 1)))
    chunk = layer_policies.chunk_within(layer_policies.common_eviction(module.policies), chunk)
    prompt = _prompt_within(lm, longest, prompt)
    chunk = layer_policies.chunk_within(prompt, chunk)
    caches = lm.init_caches(batch=1, capacity=-(-(longest or 0) // chunk) * chunk)
    buffer, start = np.zeros(0, np.int32), 0
    for piece in itertools.chain(pieces, [None]):
        last = piece is None
        buffer = buffer if last else np.concatenate([buffer, np.asarray(piece, np.int32)])
        # A chunk needs the token after it; the last one is filled up with what is not scored.
        while len(buffer) > chunk or (last and len(buffer) > 1):
            scored = min(chunk, len(buffer) - 1)
            if not bounded and longest is not None and start + scored >= longest:
                raise InputError(
                    f"more than longest={longest} tokens came, and {lm.policy.name} keeps "
                    f"every one; give the length of the stream"
                )
            lm.check_positions(start + scored)
            tokens = np.pad(buffer[: chunk + 1], (0, max(chunk + 1 - len(buffer), 0)))
            positions = start + np.arange(chunk, dtype=np.int32)[None]
            hidden, caches = lm.forward(tokens[None, :-1], positions, caches)
            loss = _losses(lm.spec, mesh, lm.replicated_params, hidden, tokens[None, 1:])
            yield np.asarray(loss[0, :scored])
            buffer, start = buffer[scored:], start + scored
            if start == prompt:
                chunk = layer_policies.chunk_within(chunk, AFTER_PROMPT)
                room = -(-((longest or 0) - start) // chunk) * chunk
                caches = prepare_decoding(module, caches, length=start, room=room)


def _prompt_within(lm: Any, longest: int | None, prompt: int | None) -> int | None:
    """The tokens of a prompt, where the policy asks for them."""
    if prompt is not None and (prompt < 1 or (longest is not None and prompt >= longest)):
        of = "" if longest is None else f" of a text of {longest} tokens"
        raise InputError(f"prompt={prompt}{of}; give at least 1, and not all")
    name = next((p.name for p in lm.decoder.policies if p.needs_prompt), None)
    if name is None:
        return None
    if prompt is None:
        raise InputError(
            f"{name} acts at the end of a prompt, and a text has none; say how many of its "
            f"tokens are one with prompt="
        )
    return prompt


@partial(jax.jit, static_argnums=(0, 1))
def _losses(spec: ModelSpec, mesh: Mesh | None, params, hidden, targets):
    """NLL [B, C] of the targets, nats."""
    run = partial(cross_entropy.token_nll, spec)
    if mesh is not None and targets.shape[1] % mesh.size == 0:
        shares = P(None, CONTEXT)
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), shares, shares), out_specs=shares, check_vma=False
        )
    return run(params, hidden, targets)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
