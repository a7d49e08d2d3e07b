"""The loss over a split vocabulary equals the unsplit one, on eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lminf import kernels
from lminf.kernels.cross_entropy.xla_chunked import Config

WIDTH, VOCAB, ROWS = 12, 53, (2, 11)  # 53 over 4 or 8 shards: the last holds less
SMALL = Config(block_rows=8, block_vocab=4)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def labels(ignored=0.2):
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, VOCAB, ROWS)
    return jnp.asarray(np.where(rng.random(ROWS) < ignored, -100, drawn))


def results(call, *, bias, vocab=VOCAB, dtype=jnp.float32, **options):
    given = {
        "embeddings": normal(0, *ROWS, WIDTH, dtype=dtype),
        "classifier": normal(1, vocab, WIDTH, dtype=dtype),
    }
    if bias:
        given["bias"] = normal(2, vocab, dtype=dtype)

    def loss(given):
        found = call(**given, labels=labels(), return_lse=True, config=SMALL, **options)
        weights = [normal(5 + i, *x.shape) for i, x in enumerate(found)]
        return sum((x * w).sum() for x, w in zip(found, weights, strict=True)), found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(given)
    found = {"loss": found.loss, "lse": found.lse} | {f"d_{n}": x for n, x in grads.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def assert_same(mesh, tolerance=2e-6, *, sharding, **options):
    found = results(kernels.sharded_linear_cross_entropy, mesh=mesh, **sharding, **options)
    expected = results(kernels.linear_cross_entropy, **options)
    for name, right in expected.items():
        error = np.linalg.norm(found[name] - right) / max(np.linalg.norm(right), 1e-3)
        assert error <= tolerance, (name, error)


EVERYTHING = {
    "logits_soft_cap": 4.0,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "shift": 1,
    "reduction": "none",
}
TOKENS = {"vocab_axis": "model", "token_axes": ("data",)}
SCATTERED = TOKENS | {"embed_reduce": "psum_scatter"}


EXPLICIT = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))


@pytest.mark.slow
def test_every_option_with_tokens_split_too(mesh):
    assert_same(mesh, sharding=SCATTERED, bias=True, **EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{"vocab_axis": "model"}, {"vocab_axis": "data"}, TOKENS])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(mesh, sharding, options, bias):
    assert_same(mesh, sharding=sharding, bias=bias, **options)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [48, 49, 56])
def test_a_shard_with_few_or_no_entries(vocab):
    """49 entries over eight shards of 7: the last holds nothing. Labels stay below 48."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    given = {"embeddings": normal(0, 22, WIDTH), "classifier": normal(1, vocab, WIDTH)}
    target = jnp.asarray(np.random.default_rng(0).integers(0, 48, 22))
    options = {"labels": target, "label_smoothing": 0.1, "filter_eps": None}
    found, expected = (
        jax.value_and_grad(lambda given, call=call, kind=kind: call(**given, **options, **kind))(
            given
        )
        for call, kind in (
            (kernels.sharded_linear_cross_entropy, {"mesh": mesh, "vocab_axis": "model"}),
            (kernels.linear_cross_entropy, {}),
        )
    )
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_sums_over_shards_are_wide(mesh):
    assert_same(mesh, 1e-2, sharding=SCATTERED, bias=True, dtype=jnp.bfloat16)


@pytest.mark.slow
def test_gradients_leave_as_their_operands_came_in(mesh):
    """dC stays split over the vocabulary and dE over what "psum_scatter" says; no device ever has
    more than its share of the classifier.
    """
    rows, vocab = 16, 64
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    embeddings = put(normal(0, rows, WIDTH), ("data", "model"), None)
    classifier = put(normal(1, vocab, WIDTH), "model", None)
    target = put(jnp.arange(rows), "data")
    grad = jax.jit(
        jax.grad(
            lambda e, c: kernels.sharded_linear_cross_entropy(e, c, target, mesh=mesh, **SCATTERED),
            (0, 1),
        )
    )
    d_embeddings, d_classifier = grad(embeddings, classifier)
    assert d_embeddings.sharding.is_equivalent_to(embeddings.sharding, 2)
    assert d_classifier.sharding.is_equivalent_to(classifier.sharding, 2)
    text = grad.lower(embeddings, classifier).compile().as_text()
    assert f"f32[{vocab // 4},{WIDTH}]" in text
    assert f"f32[{vocab},{WIDTH}]" not in text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vocab_axis": "vocab"}, "vocab_axis names 'vocab'"),
        ({"token_axes": ("rows",)}, "token_axes names 'rows'"),
        ({"token_axes": ("model",)}, "token_axes"),
        ({"mesh": EXPLICIT}, "AxisType.Auto"),
        ({"embed_reduce": "sum"}, "embed_reduce"),
        ({"labels": jnp.full(ROWS, VOCAB)}, f"labels holds {VOCAB}"),
        ({"classifier": jnp.zeros((VOCAB, WIDTH + 1))}, "classifier"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(mesh, change, word):
    given = {
        "embeddings": jnp.zeros((*ROWS, WIDTH)),
        "classifier": jnp.zeros((VOCAB, WIDTH)),
        "labels": labels(),
        "mesh": mesh,
        "vocab_axis": "model",
    }
    with pytest.raises(ValueError, match=word):
        kernels.sharded_linear_cross_entropy(**(given | change))
