import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.surgery.interpolate import interpolate, overwrite_rows, restore_chat


def drawn(seed, layers=5):
    rng = np.random.default_rng(seed)
    return {
        "embed": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
        "layers": {"mlp": {"w": jnp.asarray(rng.normal(size=(layers, 4, 3)), jnp.float32)},
                   "norm": jnp.asarray(rng.normal(size=(layers, 4)), jnp.float32)},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_the_rates_0_and_1_are_the_ends_to_the_bit(method):
    a, b = drawn(0), drawn(1)
    for rate, end in ((0.0, a), (1.0, b)):
        mixed = interpolate(a, b, lambda path, rate=rate: rate, method=method)
        np.testing.assert_array_equal(mixed["embed"], end["embed"])
        np.testing.assert_array_equal(mixed["layers"]["mlp"]["w"], end["layers"]["mlp"]["w"])


def test_between_is_the_formula_of_each_layer_by_itself():
    a, b = drawn(0), drawn(1)
    rates = [0.3, 0.5, 0.9, 0.1, 0.7]
    mixed = interpolate(a["layers"], b["layers"], lambda path: rates, method="spherical")
    for layer, t in enumerate(rates):
        x, y = (np.asarray(p["layers"]["mlp"]["w"][layer], np.float64) for p in (a, b))
        angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
        np.testing.assert_allclose(mixed["mlp"]["w"][layer], expected, atol=2e-6)
    linear = interpolate(a["layers"], b["layers"], lambda path: rates, method="linear")
    np.testing.assert_allclose(
        linear["norm"][1], 0.5 * (a["layers"]["norm"][1] + b["layers"]["norm"][1]), atol=1e-6
    )


def test_spherical_between_equal_or_opposite_or_empty_tensors_is_finite():
    a = drawn(0)
    same = interpolate(a, a, lambda path: 0.4, method="spherical")
    np.testing.assert_allclose(same["embed"], a["embed"], atol=1e-6)
    zeros = {"w": jnp.zeros((2, 2))}
    assert interpolate(zeros, zeros, lambda path: 0.4, method="spherical")["w"].sum() == 0
    opposite = interpolate({"w": a["embed"]}, {"w": -a["embed"]}, lambda path: 0.5,
                           method="spherical")  # fmt: skip
    np.testing.assert_allclose(opposite["w"], 0, atol=1e-6)


def test_a_path_chooses_its_rate():
    a, b = drawn(0), drawn(1)
    mixed = interpolate(a, b, lambda path: float(path == ("layers", "norm")), method="linear")
    np.testing.assert_array_equal(mixed["layers"]["norm"], b["layers"]["norm"])
    np.testing.assert_array_equal(mixed["layers"]["mlp"]["w"], a["layers"]["mlp"]["w"])


def test_chat_is_restored_in_the_middle_layers_and_in_the_rows_of_special_tokens():
    adapted, chat = drawn(0), drawn(1)
    adapted["embed"] = jnp.concatenate([adapted["embed"], jnp.ones((2, 4))])
    restored = restore_chat(adapted, chat, [1, 5])
    np.testing.assert_array_equal(restored["layers"]["norm"][2], chat["layers"]["norm"][2])
    a, c = (np.asarray(p["layers"]["norm"]) for p in (adapted, chat))
    for layer, rate in ((0, 0.3), (1, 0.5), (3, 0.5), (4, 0.3)):
        expected = (1 - rate) * a[layer] + rate * c[layer]
        np.testing.assert_allclose(restored["layers"]["norm"][layer], expected, atol=1e-6)
    special = jnp.array([1, 5])
    np.testing.assert_array_equal(restored["embed"][special], chat["embed"][special])
    others = np.delete(np.arange(9), [1, 5])
    np.testing.assert_array_equal(restored["embed"][others], adapted["embed"][others])


def test_models_of_two_shapes_are_refused():
    with pytest.raises(InputError, match="interpolate models of one shape"):
        interpolate(drawn(0), drawn(1, layers=4), lambda path: 0.5, method="linear")
    with pytest.raises(InputError, match="4 rates for a model of 3 layers"):
        restore_chat(drawn(0, layers=3), drawn(1, layers=3), [])
    table = overwrite_rows(jnp.zeros((3, 2)), jnp.ones((2, 2)), [1])
    np.testing.assert_array_equal(table, [[0, 0], [1, 1], [0, 0]])
