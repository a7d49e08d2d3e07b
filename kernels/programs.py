"""What the suite times: our calls and those of others in JAX, compiled, with random inputs, and the
work that each cannot do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lminf import kernels
from lminf.kernels.block_sparse.operands import Lists
from lminf.kernels.common import bench, dispatch
from lminf.kernels.common.config import to_json
from lminf.kernels.decode import cache as caches

# XLA spreads single operations of one CPU device over cores, and small ones gain nothing by it.
# With a device for each core, whole heads lie apart: the same kernel under shard_map.
BY_HEADS = "xla_chunked, heads over CPU devices"


@dataclass(frozen=True)
class Work:
    """One thing to time: sizes by their letters, and who is asked to do it."""

    op: str
    case: dict[str, int]
    grad: bool
    implementations: tuple[str, ...]
    peers: tuple[str, ...] = ()

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.grad else "fwd"


class Program(NamedTuple):
    """A compiled call with its inputs. `calls` of them make one timing."""

    run: Callable[[int], Any]
    calls: int
    temporary_bytes: int
    config: dict[str, Any]  # the sizes of its tiles, where they are ours to choose


def build(work: Work, implementation: str, dtype: str, *, copies: int = 2) -> Program:
    """Our call, compiled. Two sets of random inputs, in turns."""
    maker = {
        "lambda_attention": _attention, "linear_cross_entropy": _loss,
        "lambda_decode": _decode, "block_sparse_attention": _blocks,
    }[work.op]  # fmt: skip
    if work.op == "lambda_decode":
        # Microseconds on an accelerator: eight caches one after the other in one program.
        fn, inputs = maker(work.case, implementation, dtype, 8)
        one, config = _compiled(fn, inputs[0])
        return Program(bench.chained(fn, inputs), len(inputs), _temporary_bytes(one), config)
    fn, inputs = maker(work.case, implementation, dtype, copies)
    if work.grad:
        fn = _differentiated(fn, inputs[0])
    compiled, config = _compiled(fn, inputs[0])
    return Program(bench.blocking(compiled, inputs), 1, _temporary_bytes(compiled), config)


def _compiled(fn: Callable, inputs: tuple) -> tuple[Any, dict[str, Any]]:
    """The program, and the config that the kernel in it settled on."""
    with dispatch.recording() as decisions:
        compiled = jax.jit(fn).lower(*inputs).compile()
    configs = [decision.config for decision in decisions if decision.config is not None]
    return compiled, to_json(configs[-1]) if configs else {}


def _temporary_bytes(compiled) -> int:
    """Of the program; -1 where the backend does not say."""
    analysis = compiled.memory_analysis()
    return -1 if analysis is None else analysis.temp_size_in_bytes


def _differentiated(fn: Callable, inputs: tuple) -> Callable:
    """Value and gradients of every floating-point input, for a random cotangent."""
    floating = tuple(i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating))
    out = jax.eval_shape(fn, *inputs)
    cotangent = _normal(np.random.default_rng(9), out.dtype, *out.shape) if out.ndim else None

    def total(*args):
        out = fn(*args)
        return out if cotangent is None else (out * cotangent).astype(jnp.float32).sum()

    return jax.value_and_grad(total, floating)


def _normal(rng, dtype, *shape, scale: float = 1.0):
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


def _attention(case, implementation: str, dtype: str, copies: int):
    b, t, n, k, h, g = (case[x] for x in "BTNKHg")
    rng = np.random.default_rng(0)
    by_heads = implementation == BY_HEADS

    def attend(query, key, value, query_global, key_global):
        return kernels.lambda_attention(
            query, key, value, query_global=query_global, key_global=key_global,
            num_global=g, window_size=case["w"],
            implementation="xla_chunked" if by_heads else implementation,
        )  # fmt: skip

    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h), (b, g, k, h)]
    inputs = [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(copies)]
    if not by_heads:
        return attend, inputs
    mesh = jax.make_mesh((jax.device_count(),), ("heads",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, None, "heads")
    spread = jax.shard_map(
        attend, mesh=mesh, in_specs=(split,) * len(shapes), out_specs=split, check_vma=False
    )
    return spread, jax.device_put(inputs, NamedSharding(mesh, split))


def _loss(case, implementation: str, dtype: str, copies: int):
    rows, width, vocab = (case[x] for x in "NDV")
    rng = np.random.default_rng(0)

    def loss(embeddings, classifier, labels):
        return kernels.linear_cross_entropy(
            embeddings, classifier, labels, implementation=implementation
        )

    classifier = _normal(rng, dtype, vocab, width, scale=0.05)  # too large for any cache
    return loss, [
        (_normal(rng, dtype, rows, width), classifier, jnp.asarray(rng.integers(0, vocab, rows)))
        for _ in range(copies)
    ]


def _decode(case, implementation: str, dtype: str, copies: int):
    b, n, k, h, w, g = (case[x] for x in "BNKHwg")
    rng = np.random.default_rng(0)

    def decode(query, cache):
        return kernels.lambda_decode(query, cache, implementation=implementation)

    def cache():
        length = jnp.full(b, case["T"], jnp.int32)
        far, near = ([_normal(rng, dtype, b, k, slots, h) for _ in range(2)] for slots in (g, w))
        return caches.RollingCache(far[0], far[1], near[0], near[1], length)

    return decode, [(_normal(rng, dtype, b, n, h), cache()) for _ in range(copies)]


def _blocks(case, implementation: str, dtype: str, copies: int):
    b, t, n, k, h = (case[x] for x in "BTNKH")
    rng, block = np.random.default_rng(0), case["block"]
    lists = _random_lists(rng, -(-t // block), case["listed"])

    def attend(query, key, value):
        return kernels.block_sparse_attention(
            query, key, value, block_q=block, block_kv=block, implementation=implementation,
            block_indices=lists.indices, block_counts=lists.counts,
        )  # fmt: skip

    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h)]
    return attend, [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(copies)]


def _random_lists(rng, blocks: int, listed: int) -> Lists:
    """Causal lists of up to `listed` blocks, one's own among them."""
    indices = np.full((1, 1, blocks, listed), -1, np.int32)
    for q in range(blocks):
        drawn = np.sort(rng.permutation(q)[: listed - 1])
        indices[0, 0, q, : len(drawn) + 1] = [*drawn, q]
    return Lists(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1, dtype=np.int32)))


def jax_peer(name: str, work: Work, dtype: str) -> Program:
    """An attention of somebody else's in JAX, compiled; raises what it raises."""
    case = work.case
    b, t, n, k, h = (case[x] for x in "BTNKH")
    if "xla" in name and 4 * b * n * t * t > 3e9:
        raise NotImplementedError(f"its logits would take {4 * b * n * t * t / 1e9:.0f} GB")
    if "cudnn" in name and jax.default_backend() != "gpu":
        raise NotImplementedError("needs a gpu")
    rng = np.random.default_rng(0)
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h)]
    inputs = [tuple(_normal(rng, dtype, *s) for s in shapes) for _ in range(2)]

    def attend(query, key, value):
        if "tokamax" in name:
            import tokamax  # type: ignore[import-not-found]  # a peer, where it is installed

            return tokamax.dot_product_attention(query, key, value, is_causal=True)
        window = (case["w"] - 1, 0) if "window" in name else None
        implementation = "cudnn" if "cudnn" in name else "xla"
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=window,
            implementation=implementation,
        )  # fmt: skip

    compiled = jax.jit(attend).lower(*inputs[0]).compile()
    return Program(bench.blocking(compiled, inputs), 1, _temporary_bytes(compiled), {})


# --- Floors ---------------------------------------------------------------------------------------


def pairs(length: int, *, window: int, num_global: int) -> int:
    """Visible pairs of one head."""
    window = min(window, length)
    near = window * (window + 1) // 2 + (length - window) * window
    beyond = np.arange(length) - window + 1
    return near + int(np.clip(beyond, 0, num_global).sum())


def costs(work: Work, itemsize: int) -> tuple[float, float]:
    """FLOPs and bytes that the work cannot do without."""
    case = work.case
    if work.op == "linear_cross_entropy":
        rows, width, vocab = (case[x] for x in "NDV")
        gemm = 2.0 * rows * width * vocab
        arrays = (rows + vocab) * width * itemsize
        return (4 * gemm, 3 * arrays) if work.grad else (gemm, arrays)
    b, t, n, k, h = (case[x] for x in "BTNKH")
    if work.op == "lambda_decode":
        slots = case["w"] + case["g"]
        return 4.0 * b * n * slots * h, 2.0 * b * k * slots * h * itemsize
    if work.op == "block_sparse_attention":
        block, blocks = case["block"], -(-t // case["block"])
        listed = sum(min(q + 1, case["listed"]) for q in range(blocks))
        seen = listed * block * block - blocks * block * (block - 1) // 2
    else:
        seen = pairs(t, window=case["w"], num_global=case["g"])
    forward = 4.0 * b * n * h * seen
    arrays = 2.0 * b * t * (n + k) * h * itemsize
    return (3.5 * forward, 3 * arrays) if work.grad else (forward, arrays)
