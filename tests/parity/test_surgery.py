"""What is computed of tensors and of tokens' vectors, beside mergekit's slerp and deepfocus."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.surgery import vocab_map
from lminf.surgery.interpolate import interpolate

pytestmark = pytest.mark.parity

ATOL = 1e-5


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_spherical_interpolation_is_mergekits(peer, rate):
    """Of any tensors, of a nearly equal pair, of opposite ones, and layer by layer."""
    from mergekit.merge_methods.slerp import slerp

    rng = np.random.default_rng(0)
    first = rng.normal(size=(4, 8, 6)).astype(np.float32)
    second = rng.normal(size=(4, 8, 6)).astype(np.float32)
    second[1] = first[1] + 1e-3 * second[1]
    second[2] = -2 * first[2]
    second[3] *= 50
    rates = [rate, 1 - rate, rate, rate]
    expected = slerp(*map(peer.torch.tensor, (np.float32(rates), first, second))).numpy()
    ours = interpolate(
        {"w": jnp.asarray(first)}, {"w": jnp.asarray(second)}, lambda path: rates,
        method="spherical",
    )["w"]  # fmt: skip
    np.testing.assert_allclose(ours, expected, atol=ATOL)
    whole = slerp(
        *map(peer.torch.tensor, (np.float32([rate]), first[None], second[None]))
    ).numpy()  # fmt: skip
    ours = interpolate(
        {"w": jnp.asarray(first)}, {"w": jnp.asarray(second)}, lambda path: rate,
        method="spherical",
    )["w"]  # fmt: skip
    np.testing.assert_allclose(ours, whole[0], atol=ATOL)


def test_shares_and_rows_of_focus_are_deepfocus(peer):
    """From the same vectors of tokens: the shares, and the rows of a table that they make."""
    from deepfocus.focus import focus_additional_token_initialization

    rng = np.random.default_rng(1)
    old, new, channels = 40, 7, 5
    vectors = rng.normal(size=(old + new, 12)).astype(np.float32)
    vectors[old] = 3 * vectors[4]  # as an old one, but for its length
    table = rng.normal(size=(old, channels)).astype(np.float32)

    def theirs(of_old):
        rows = peer.torch.tensor(of_old)
        overlapping = {
            str(i): SimpleNamespace(auxiliary_embedding=vectors[i], source_embedding=rows[i])
            for i in range(old)
        }
        added = {
            str(i): SimpleNamespace(
                auxiliary_embedding=vectors[old + i], target=SimpleNamespace(id=i)
            )
            for i in range(new)
        }
        empty = peer.torch.zeros((new, rows.shape[1]))
        return focus_additional_token_initialization(overlapping, added, empty, "cpu").numpy()

    rows = vocab_map.focus_rows(vectors, old_tokens=old)
    shares = np.array([[row.get(i, 0.0) for i in range(old)] for row in rows])
    assert (shares > 0).sum(1).min() < old  # sparse
    np.testing.assert_allclose(shares, theirs(np.eye(old, dtype=np.float32)), atol=ATOL)
    mapping = vocab_map.vocab_map(rows, old_tokens=old, old_rows=old)
    expanded = np.asarray(mapping.table(jnp.asarray(table), seed=0))[old:]
    np.testing.assert_allclose(expanded, theirs(table), atol=ATOL)
