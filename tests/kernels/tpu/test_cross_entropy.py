"""The linear cross-entropy for a TPU: numbers in the interpreter, lowering, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.cross_entropy.mosaic_tpu import Config
from tests.kernels import test_cross_entropy as shared

SMALL = Config(block_rows=8, block_vocab=16)  # 22 rows and 53 entries are no multiples


def results(case, **options):
    return shared.results(implementation="mosaic_tpu", **(shared.CASES[case] | options))


@pytest.mark.slow
def test_values(interpreter):
    """Bias, soft cap, smoothing, z-loss, an incomplete last block of either axis."""
    target = shared.labels()
    embeddings, classifier, bias = (
        jnp.asarray(shared.normal(seed, *shape))
        for seed, shape in ((0, (*shared.ROWS, 12)), (1, (53, 12)), (2, (53,)))
    )
    loss, lse = (
        kernels.linear_cross_entropy(
            embeddings, classifier, target, bias=bias, logits_soft_cap=4.0, label_smoothing=0.1,
            z_loss=0.01, reduction="none", return_lse=True,
            implementation=name, config=config,
        )
        for name, config in (("mosaic_tpu", SMALL), ("reference", None))
    )  # fmt: skip
    for found, right in zip(loss, lse, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("filter_eps", [None, "auto"])
@pytest.mark.parametrize("case", shared.CASES)
def test_gradients(interpreter, case, filter_eps):
    found = results(case, config=SMALL, filter_eps=filter_eps)
    shared.assert_close(found, shared.expected(case), 5e-6)


@pytest.mark.slow
def test_gradients_on_two_cores(two_cores):
    found = results("everything", config=SMALL)
    shared.assert_close(found, shared.expected("everything"), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [Config(16, 53), Config(512, 512), Config(8, 8)])
def test_sizes(interpreter, config):
    shared.assert_close(results("sum, bias", config=config), shared.expected("sum, bias"), 5e-6)


@pytest.mark.slow
def test_bfloat16(interpreter):
    found = results("sum, bias", config=SMALL, dtype=jnp.bfloat16)
    shared.assert_close(found, shared.expected("sum, bias"), 2e-2)


@pytest.mark.slow
def test_filter_leaves_blocks_without_labels_out(interpreter):
    """Above every probability only blocks that hold a label are left: their columns are exact."""
    embeddings = jnp.asarray(shared.normal(0, 8, 12))
    classifier = jnp.asarray(shared.normal(1, 53, 12))
    target = jnp.arange(8) // 2 + 16  # all in the second block of 16

    def grad(filter_eps, implementation, config):
        return jax.grad(
            lambda c: kernels.linear_cross_entropy(
                embeddings, c, target, reduction="sum", filter_eps=filter_eps,
                implementation=implementation, config=config,
            )
        )(classifier)  # fmt: skip

    filtered, exact = grad(2.0, "mosaic_tpu", SMALL), grad(None, "reference", None)
    np.testing.assert_allclose(filtered[16:32], exact[16:32], atol=1e-5)
    assert (filtered[:16] == 0).all()
    assert (filtered[32:] == 0).all()


def test_lowers_for_a_tpu_without_one():
    shapes = [
        jax.ShapeDtypeStruct((1000, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((5000, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((1000,), jnp.int32),
    ]

    def grad(*arrays):
        return jax.value_and_grad(
            lambda *pair: kernels.linear_cross_entropy(
                *pair, arrays[2], implementation="mosaic_tpu"
            ),
            (0, 1),
        )(*arrays[:2])

    text = jax.jit(grad).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("forward", "d_embeddings", "d_classifier"):
        assert f"cross_entropy_{name}" in text
    assert "1000x5000" not in text


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"embeddings": jnp.zeros((2, 4), jnp.float16)}, "float16"),
        ({"accum_dtype": jnp.bfloat16}, "accum_dtype"),
        ({"config": shared.SMALL}, "config is a"),
        (
            {"embeddings": jnp.zeros((2, 2**20)), "classifier": jnp.zeros((3, 2**20))},
            f"D={2**20}",
        ),
    ],
)
def test_refusals_name_the_reason(changed, word):
    given = {
        "embeddings": jnp.zeros((2, 4)),
        "classifier": jnp.zeros((3, 4)),
        "labels": jnp.zeros(2, jnp.int32),
    }
    with pytest.raises(ExceptionGroup) as refusal:
        kernels.linear_cross_entropy(**(given | changed), implementation="mosaic_tpu")
    assert word in str(refusal.value.exceptions[0])
