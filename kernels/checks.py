"""Accuracy of every implementation that runs here: values and gradients against float64.

e(x) = |x - oracle| / |oracle|. A result passes if e is within the absolute bound of its dtype, and
within twice that of the obvious dense computation in the same dtype plus a little; NaN never does.
Two runs must agree bit for bit.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lminf import kernels
from lminf.kernels.block_sparse import api as block_sparse
from lminf.kernels.cross_entropy import api as cross_entropy
from lminf.kernels.decode import api as decode
from lminf.kernels.decode import cache as caches
from lminf.kernels.lambda_attention import api as lambda_attention

# dtype -> absolute bounds of values and of gradients, and what is added to twice the naive error.
BOUNDS = {
    "float32": (2e-6, 5e-6, 1e-5),
    "bfloat16": (1e-2, 1e-2, 1e-4),
    "float16": (1e-3, 1e-3, 1e-4),
}
NOT_FINITE = 1e9  # the error of a result with NaN in it; JSON has no infinity

# Implementations that can only be lowered elsewhere.
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu", "triton": "gpu"}
LOSS_SLACK = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


class Case(NamedTuple):
    """One call: `run(implementation, arrays)` gives what is compared; `naive` the same, densely."""

    op: str
    name: str
    implementations: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    run: Callable[[str, dict[str, Any]], dict[str, Any]]
    naive: Callable[[dict[str, Any]], dict[str, Any]]


def check(cases: list[Case], dtypes: tuple[str, ...], refused: dict[str, str]) -> Iterator[dict]:
    """One row of the report for each case, implementation, dtype and result. Where an
    implementation does not run here, `refused` gets its reason under "op implementation".
    """
    for case in cases:
        for dtype in dtypes:
            given = {name: _typed(x, dtype) for name, x in case.arrays.items()}
            exact = _oracle(case, given)
            with _precise(dtype):
                naive = _errors(_numpy(jax.jit(case.naive)(given)), exact)
                for implementation in case.implementations:
                    platform = PLATFORMS.get(implementation)
                    if platform not in (None, jax.default_backend()):
                        refused[f"{case.op} {implementation}"] = f"needs a {platform}"
                        continue
                    run = jax.jit(
                        lambda arrays, case=case, name=implementation: case.run(name, arrays)
                    )
                    try:
                        outputs, repeated = _numpy(run(given)), _numpy(run(given))
                    except (NotImplementedError, ExceptionGroup) as reason:
                        shown = getattr(reason, "exceptions", (reason,))[0]
                        refused[f"{case.op} {implementation}"] = str(shown)
                        continue
                    # A compiler or driver that gives up is a failed check, not the end of the run.
                    except Exception as error:
                        broken = f"{case.name}: {type(error).__name__}: {error}"[:300]
                        yield failure(case.op, implementation, broken, dtype)
                        continue
                    errors = _errors(outputs, exact)
                    for name, error in errors.items():
                        row = {
                            "op": case.op,
                            "impl": implementation,
                            "case": f"{case.name}: {name}",
                            "dtype": dtype,
                            "err": error,
                            "naive_err": naive[name],
                        }
                        yield row | {"ok": _passes(row, name)}
                    same = all(
                        np.array_equal(outputs[n], repeated[n], equal_nan=True) for n in outputs
                    )
                    yield {
                        "op": case.op,
                        "impl": implementation,
                        "case": f"{case.name}: two runs are bitwise equal",
                        "dtype": dtype,
                        "err": float(not same),
                        "naive_err": 0.0,
                        "ok": same,
                    }


def failure(op: str, implementation: str, case: str, dtype: str) -> dict[str, Any]:
    """The row of a check that came to no number."""
    return {
        "op": op, "impl": implementation, "case": case, "dtype": dtype,
        "err": NOT_FINITE, "naive_err": 0.0, "ok": False,
    }  # fmt: skip


def _passes(row: dict, name: str) -> bool:
    value, gradient, slack = BOUNDS[row["dtype"]]
    if name == "loss":  # of a mean near ln V: held against the naive one only
        return row["err"] <= row["naive_err"] + LOSS_SLACK[row["dtype"]]
    absolute = gradient if name.startswith("d_") else value
    return row["err"] <= min(absolute, 2 * row["naive_err"] + slack)


def _typed(x: np.ndarray, dtype: str):
    return jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype)


def _precise(dtype: str):
    """True float32 products where float32 is being tested, and the machine's own elsewhere."""
    if dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _oracle(case: Case, given: dict) -> dict[str, np.ndarray]:
    """The reference in float64 on the CPU, of the inputs as they were rounded."""
    rounded = {name: np.asarray(x.astype(jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating)
               else np.asarray(x) for name, x in given.items()}  # fmt: skip
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = {
            name: jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else x.dtype)
            for name, x in rounded.items()
        }
        return _numpy(case.run("reference", wide))


def _numpy(outputs: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32),
                             np.float64) for name, x in outputs.items()}  # fmt: skip


def _errors(outputs: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    errors = {}
    for name, right in exact.items():
        left = outputs[name]
        # A row that sees nothing has the LSE -inf in both; anything else infinite is an error.
        empty = np.isneginf(left) & np.isneginf(right)
        left, right = np.where(empty, 0, left), np.where(empty, 0, right)
        error = np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30)
        errors[name] = float(error) if np.isfinite(error) else NOT_FINITE
    return errors


# --- Cases ----------------------------------------------------------------------------------------


def cases(seed: int) -> list[Case]:
    """What every implementation is asked, with fresh random inputs."""
    return [
        _lambda(seed, "grouped heads, odd sizes", keys=301, heads=8, window=70, num_global=9),
        _lambda(seed, "causal", keys=200, heads=2, window=200, num_global=0),
        _decode(seed),
        _loss(seed),
        _blocks(seed),
    ]


def _normal(seed: int, **shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def _with_gradients(fn: Callable, arrays: dict, names: tuple[str, ...], weights: dict):
    """Results of `fn`, and gradients of their weighted sum in the arrays named."""

    def total(chosen):
        outputs = fn(arrays | chosen)
        parts = [(outputs[name].astype(w.dtype) * w).sum() for name, w in weights.items()]
        return sum(parts), outputs

    grads, outputs = jax.grad(total, has_aux=True)({name: arrays[name] for name in names})
    return outputs | {f"d_{name}": x for name, x in grads.items()}


def _dense(query, key, value, seen):
    """The obvious softmax(q k^T) v in the dtype given, statistics in float32: (out, LSE)."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, 2) for x in (key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=wide)
    return _weigh(logits * query.shape[-1] ** -0.5, value, seen)


def _weigh(logits, value, seen):
    logits = jnp.where(seen, logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value)
    return {"out": out, "lse": jnp.where(seen.any(-1), lse, -jnp.inf)}


def _distance(queries: int, keys: int):
    return jnp.arange(queries)[:, None] - jnp.arange(keys)[None]


def _lambda(seed, name: str, *, keys: int, heads: int, window: int, num_global: int) -> Case:
    key_heads, width = 2, 64
    arrays = _normal(
        seed,
        query=(2, keys, heads, width), query_global=(2, keys, heads, width),
        key=(2, keys, key_heads, width), key_global=(2, num_global, key_heads, width),
        value=(2, keys, key_heads, width), d_out=(2, keys, heads, width),
    )  # fmt: skip
    names = ("query", "key", "value")
    if num_global:
        names = (*names, "query_global", "key_global")

    def run(implementation, arrays):
        weight = {"out": arrays["d_out"]}

        def attend(arrays):
            out, lse = kernels.lambda_attention(
                *(arrays[name] for name in ("query", "key", "value")),
                query_global=arrays["query_global"] if num_global else None,
                key_global=arrays["key_global"] if num_global else None,
                num_global=num_global, window_size=window, implementation=implementation,
                return_residuals=True,
            )  # fmt: skip
            return {"out": out, "lse": lse}

        return _with_gradients(attend, arrays, names, weight)

    def naive(arrays):
        def attend(arrays):
            apart = _distance(keys, keys)
            near = (apart >= 0) & (apart < window)
            if not num_global:
                return _dense(arrays["query"], arrays["key"], arrays["value"], near)
            group, wide = heads // key_heads, jnp.float32
            parts = [("query_global", "key_global"), ("query", "key")]
            logits = jnp.concatenate(
                [
                    jnp.einsum("btnh,bsnh->bnts", arrays[q], jnp.repeat(arrays[k], group, 2),
                               preferred_element_type=wide)
                    for q, k in parts
                ],
                -1,
            )  # fmt: skip
            seen = jnp.concatenate([apart[:, :num_global] >= window, near], -1)
            value = jnp.repeat(arrays["value"], group, 2)
            value = jnp.concatenate([value[:, :num_global], value], 1)
            return _weigh(logits * width**-0.5, value, seen[None, None])

        return _with_gradients(attend, arrays, names, {"out": arrays["d_out"]})

    return Case("lambda_attention", name, _others(lambda_attention), arrays, run, naive)


def _others(api) -> tuple[str, ...]:
    return tuple(name for name in api.IMPLEMENTATIONS if name != "reference")


def _decode(seed: int) -> Case:
    """One row whose ring has wrapped, one that is not full, one that has read nothing."""
    lengths, window, num_global, heads, key_heads, width = (391, 20, 0), 130, 9, 8, 2, 64
    arrays = _normal(
        seed,
        query=(3, heads, width), query_global=(3, heads, width),
        key=(3, 391, key_heads, width), key_global=(3, 391, key_heads, width),
        value=(3, 391, key_heads, width),
    )  # fmt: skip

    def run(implementation, arrays):
        cache = caches.empty(
            3, key_heads, width, num_global=num_global, window_size=window,
            dtype=arrays["key"].dtype,
        )  # fmt: skip
        cache = caches.append(
            cache, arrays["key"], arrays["value"], key_global=arrays["key_global"],
            count=jnp.array(lengths, jnp.int32),
        )  # fmt: skip
        out, lse = kernels.lambda_decode(
            arrays["query"], cache, query_global=arrays["query_global"],
            implementation=implementation, return_residuals=True,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def naive(arrays):
        group = heads // key_heads
        last = jnp.array(lengths)[:, None] - 1
        positions = jnp.arange(391)[None]
        seen = jnp.concatenate(
            [
                last - positions[:, :num_global] >= window,
                (positions <= last) & (last - positions < window),
            ],
            -1,
        )
        logits = jnp.concatenate(
            [
                jnp.einsum("bnh,bsnh->bns", arrays[q], jnp.repeat(k, group, 2),
                           preferred_element_type=jnp.float32)
                for q, k in (
                    ("query_global", arrays["key_global"][:, :num_global]),
                    ("query", arrays["key"]),
                )
            ],
            -1,
        )  # fmt: skip
        value = jnp.repeat(arrays["value"], group, 2)
        value = jnp.concatenate([value[:, :num_global], value], 1)
        outputs = _weigh(logits[:, :, None] * width**-0.5, value, seen[:, None, None])
        return {"out": outputs["out"][:, 0], "lse": outputs["lse"][:, :, 0]}

    return Case("lambda_decode", "uneven lengths", _others(decode), arrays, run, naive)


def _loss(seed: int) -> Case:
    rows, width, vocab = 300, 64, 1003
    arrays = _normal(seed, embeddings=(rows, width), classifier=(vocab, width), weight=(rows,))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocab, rows)
    arrays["labels"] = np.where(rng.random(rows) < 0.1, -100, labels).astype(np.int32)
    names = ("embeddings", "classifier")

    def results(arrays, loss: Callable):
        weight = arrays["weight"].astype(jnp.promote_types(arrays["weight"].dtype, jnp.float32))
        return _with_gradients(loss, arrays, names, {"losses": weight})

    def run(implementation, arrays):
        def loss(arrays):
            result = kernels.linear_cross_entropy(
                *(arrays[name] for name in (*names, "labels")),
                implementation=implementation, reduction="none", return_lse=True, filter_eps=None,
            )  # fmt: skip
            assert isinstance(result, kernels.LossAndLse)
            return {"losses": result.loss, "lse": result.lse, "loss": result.loss.mean()}

        return results(arrays, loss)

    def naive(arrays):
        def loss(arrays):
            wide = (x.astype(jnp.float32) for x in (arrays["embeddings"], arrays["classifier"]))
            logits = jnp.matmul(next(wide), next(wide).T)
            lse = jax.nn.logsumexp(logits, axis=-1)
            labels = jnp.maximum(arrays["labels"], 0)
            label_logits = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
            losses = jnp.where(arrays["labels"] >= 0, lse - label_logits, 0)
            return {"losses": losses, "lse": lse, "loss": losses.mean()}

        return results(arrays, loss)

    return Case("linear_cross_entropy", "odd sizes", _others(cross_entropy), arrays, run, naive)


def _blocks(seed: int) -> Case:
    length, heads, key_heads, width, block = 300, 8, 2, 64, 128
    blocks = -(-length // block)
    arrays = _normal(
        seed,
        query=(2, length, heads, width), key=(2, length, key_heads, width),
        value=(2, length, key_heads, width), d_out=(2, length, heads, width),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays["counts"] = rng.integers(0, blocks + 1, (2, key_heads, blocks)).astype(np.int32)
    arrays["indices"] = np.full((2, key_heads, blocks, blocks), -1, np.int32)
    for row in np.ndindex(2, key_heads, blocks):
        count = arrays["counts"][row]
        arrays["indices"][row][:count] = np.sort(rng.permutation(blocks)[:count])
    names = ("query", "key", "value")

    def run(implementation, arrays):
        def attend(arrays):
            out, lse = kernels.block_sparse_attention(
                *(arrays[name] for name in names), block_q=block, block_kv=block,
                block_indices=arrays["indices"], block_counts=arrays["counts"],
                implementation=implementation, return_residuals=True,
            )  # fmt: skip
            return {"out": out, "lse": lse}

        return _with_gradients(attend, arrays, names, {"out": arrays["d_out"]})

    def naive(arrays):
        def attend(arrays):
            used = jnp.arange(blocks) < arrays["counts"][..., None]
            named = arrays["indices"][..., None] == jnp.arange(blocks)
            listed = (named & used[..., None]).any(-2)
            listed = jnp.repeat(jnp.repeat(listed, block, 2), block, 3)[:, :, :length, :length]
            seen = jnp.repeat(listed, heads // key_heads, 1) & (_distance(length, length) >= 0)
            return _dense(arrays["query"], arrays["key"], arrays["value"], seen)

        return _with_gradients(attend, arrays, names, {"out": arrays["d_out"]})

    return Case("block_sparse_attention", "random lists", _others(block_sparse), arrays, run, naive)
