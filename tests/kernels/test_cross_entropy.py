"""Every option of linear_cross_entropy, values and gradients, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.cross_entropy import xla_chunked
from lminf.kernels.cross_entropy.xla_chunked import Config

ROWS, WIDTH, VOCAB = (2, 11), 12, 53
SMALL = Config(block_rows=8, block_vocab=16)  # rows and vocabulary are no multiples


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels(ignored=0.2):
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, VOCAB, ROWS)
    return jnp.asarray(np.where(rng.random(ROWS) < ignored, -100, drawn))


CASES = {
    "plain": {},
    "everything": {
        "bias": True,
        "logits_soft_cap": 4.0,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "shift": 1,
        "reduction": "none",
    },
    "sum, bias": {"bias": True, "reduction": "sum"},
    "soft cap, z": {"logits_soft_cap": 2.0, "z_loss": 0.1, "shift": 3},
}


def results(*, dtype=np.float32, implementation="xla_chunked", config=None, target=None, **options):
    """Loss, LSE and gradients of every operand as numpy float64."""
    target = labels() if target is None else target
    given = {"embeddings": normal(0, *ROWS, WIDTH), "classifier": normal(1, VOCAB, WIDTH)}
    if options.pop("bias", False):
        given["bias"] = normal(2, VOCAB)
    given = {name: jnp.asarray(x, dtype) for name, x in given.items()}

    def loss(given):
        attend = functools.partial(
            kernels.linear_cross_entropy, labels=target, implementation=implementation,
            config=config, return_lse=True, **options,
        )  # fmt: skip
        found = attend(**given)
        weights = [jnp.asarray(normal(5 + i, *x.shape), x.dtype) for i, x in enumerate(found)]
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True)), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(given)
    found = {"loss": found.loss, "lse": found.lse} | {f"d_{n}": x for n, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        error = np.linalg.norm(found[name] - right) / max(np.linalg.norm(right), 1e-3)
        assert error <= tolerance, (name, error)


@functools.cache
def expected(case):
    with jax.enable_x64(True):
        return results(dtype=np.float64, implementation="reference", **CASES[case])


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_chunked(case):
    assert_close(results(config=SMALL, **CASES[case]), expected(case), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("filter_eps", [None, "auto"])
@pytest.mark.parametrize("config", [SMALL, None, Config(3, 53), Config(22, 1)])
def test_chunked_sizes(case, config, filter_eps):
    found = results(config=config, filter_eps=filter_eps, **CASES[case])
    assert_close(found, expected(case), 5e-6)


FORWARD = Config(block_rows=8, gradients="forward")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean"},
        {"bias": True, "reduction": "sum", "logits_soft_cap": 2.0},
        {"reduction": "mean", "shift": 2, "z_loss": 0.1, "label_smoothing": 0.1},
    ],
)
def test_gradients_formed_in_the_forward(options):
    """Equal those of the backward form; the LSE is given, without a gradient."""

    def grads(config):
        given = {
            "embeddings": jnp.asarray(normal(0, *ROWS, WIDTH)),
            "classifier": jnp.asarray(normal(1, VOCAB, WIDTH)),
        }
        call = dict(options)
        if call.pop("bias", False):
            given["bias"] = jnp.asarray(normal(2, VOCAB))

        def loss(given):
            found = kernels.linear_cross_entropy(
                **given, labels=labels(), config=config, return_lse=True, filter_eps=None, **call
            )
            return 3 * found.loss, found

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(given)
        return {"loss": found.loss, "lse": found.lse} | grads

    assert_close(grads(FORWARD), grads(SMALL), 5e-6)


def test_gradients_formed_in_the_forward_need_one_number():
    with pytest.raises(ExceptionGroup) as refused:
        results(config=FORWARD, reduction="none")
    assert "reduction" in str(refused.value.exceptions[0])


@pytest.mark.slow
def test_accumulating_in_bfloat16_and_two_equal_runs():
    """Narrow sums show; the same program run twice gives the same bits."""
    call = functools.partial(results, dtype=jnp.bfloat16, config=SMALL, deterministic=True)
    wide, again, narrow = call(), call(), call(accum_dtype=jnp.bfloat16)
    for name, x in wide.items():
        np.testing.assert_array_equal(x, again[name])
    assert_close(narrow, wide, 3e-2)
    assert (narrow["d_embeddings"] != wide["d_embeddings"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_low_precision(dtype, tolerance):
    found = results(dtype=dtype, config=SMALL, **CASES["sum, bias"])
    assert_close(found, expected("sum, bias"), tolerance)


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        found = results(dtype=np.float64, config=SMALL, **CASES["everything"])
    assert_close(found, expected("everything"), 1e-13)


def test_all_labels_ignored():
    found = results(config=SMALL, target=jnp.full(ROWS, -100))
    assert found["loss"] == 0


@pytest.mark.slow
def test_filter_error_is_bounded_and_the_labels_stay():
    """With a threshold above every probability only the labels' part of the gradient is left."""
    embeddings, classifier = jnp.asarray(normal(0, 8, WIDTH)), jnp.asarray(normal(1, VOCAB, WIDTH))
    target = jnp.arange(8) * 5
    grad = jax.grad(
        lambda c, eps: kernels.linear_cross_entropy(
            embeddings, c, target, reduction="sum", filter_eps=eps, config=SMALL
        )
    )
    np.testing.assert_allclose(
        grad(classifier, 2.0), jnp.zeros_like(classifier).at[target].add(-embeddings), atol=1e-6
    )
    eps = 1e-2
    skipped = jnp.abs(grad(classifier, eps) - grad(classifier, None)).max()
    assert skipped <= eps * jnp.abs(embeddings).sum(0).max()


@pytest.mark.parametrize("rows", [100, 3000, 8192, 9000])
def test_blocks_of_an_accelerator_fit_the_budget_and_are_even(rows, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = xla_chunked.default_config(rows, 256000, 2304, 2, xla_chunked.BUDGET_BYTES)
    logits = found.block_rows * found.block_vocab * 6
    assert logits + 4 * 2304 * (rows + found.block_vocab) <= xla_chunked.BUDGET_BYTES
    assert -rows % found.block_rows < 256 * -(-rows // found.block_rows)
    assert found.block_rows <= rows
    if rows == 8192:  # 297 MB of temporary memory in the program for an H100
        assert found == Config(2048, 8192)


def test_no_array_of_all_logits():
    """Temporary memory at N=1024, D=512, V=49152, loss and gradients: 25 MB (logits: 201 MB)."""
    shapes = [
        jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        jax.ShapeDtypeStruct((49152, 512), jnp.float32),
        jax.ShapeDtypeStruct((1024,), jnp.int32),
    ]
    grad = jax.value_and_grad(kernels.linear_cross_entropy, (0, 1))
    compiled = jax.jit(grad).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 25e6


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"classifier": jnp.zeros((VOCAB, WIDTH + 1))}, "classifier"),
        ({"labels": jnp.zeros((2, 10), int)}, "labels"),
        ({"labels": jnp.full(ROWS, VOCAB)}, f"labels holds {VOCAB}"),
        ({"labels": jnp.full(ROWS, -1)}, "labels holds -1"),
        ({"bias": jnp.zeros(3)}, "bias"),
        ({"reduction": "median"}, "reduction"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"shift": -1}, "shift"),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(change, word):
    given = {
        "embeddings": jnp.zeros((*ROWS, WIDTH)),
        "classifier": jnp.zeros((VOCAB, WIDTH)),
        "labels": labels(),
    }
    with pytest.raises(ValueError, match=word):
        kernels.linear_cross_entropy(**(given | change))


def test_label_outside_is_nan_inside_jit():
    loss = jax.jit(functools.partial(kernels.linear_cross_entropy, reduction="none"))
    found = loss(jnp.ones((2, 4)), jnp.ones((5, 4)), jnp.array([5, 1]))
    assert np.isnan(found[0])
    assert np.isfinite(found[1])
