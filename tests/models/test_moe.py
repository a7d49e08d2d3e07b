"""Mixtures of experts: what they are where they are something simpler, and on a mesh."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import policy as policies
from lminf.models import cost, decoder, layers, moe
from lminf.models.routers import Hash, TokenChoice, expert_slots
from lminf.models.spec import MoESpec
from lminf.objectives import terms
from lminf.train.step import State
from tests.attention import cases
from tests.models import specs
from tests.train import making

MIX = MoESpec(experts=4, top_k=2, hidden_dim=24, shared_dim=8, dense_layers=0,
              normalised=False, capacity_factor=None)  # fmt: skip
WIDTH = 16
SHAPE = dataclasses.replace(making.SPEC, tied=False)


def experts(**changes):
    mix = dataclasses.replace(MIX, **changes)
    product = partial(layers.activated, SHAPE.mlp)
    return moe.Experts(mix, WIDTH, product, True, layers.unconstrained)


def ran(module, params, x):
    @cases.compiled
    def run(params, x):
        return module.apply({"params": params}, x, mutable=[moe.ROUTING])

    out, seen = run(params, x)
    return out, {name: float(seen[moe.ROUTING][name][0]) for name in moe.MEASURES}


def one(params, index, x):
    """Expert `index` of every token, in NumPy: x silu is x / (1 + exp(-x))."""
    up, gate, down = (params[name][index] for name in ("up", "gate", "down"))
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


def test_all_experts_with_equal_weights_are_their_mean(x, params):
    even = params | {"router": np.zeros_like(params["router"])}
    out, seen = ran(experts(top_k=4), even, x)
    wanted = sum(one(params, index, x) for index in range(4)) / 4
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    assert seen["balance"] == pytest.approx(1.0)
    assert seen["z"] == pytest.approx(math.log(4) ** 2, rel=1e-6)
    assert seen["dropped"] == 0


def test_each_token_is_the_weighed_sum_of_its_experts(x, params):
    out, _ = ran(experts(), params, x)
    share = np.exp(x @ params["router"])
    share /= share.sum(-1, keepdims=True)
    chosen = np.argsort(-share, axis=-1)[..., :2]
    weight = np.take_along_axis(share, chosen, axis=-1)
    for b, t in ((0, 0), (1, 5)):
        wanted = sum(weight[b, t, i] * one(params, chosen[b, t, i], x[b, t]) for i in range(2))
        np.testing.assert_allclose(out[b, t], wanted, atol=1e-6)
    halved, _ = ran(experts(normalised=True), params, x)
    np.testing.assert_allclose(halved, out / weight.sum(-1, keepdims=True), atol=1e-6)


def test_with_room_for_all_nothing_is_dropped(x, params):
    out, _ = ran(experts(), params, x)
    capped, seen = ran(experts(capacity_factor=4.0), params, x)
    assert seen["dropped"] == 0
    np.testing.assert_allclose(capped, out, atol=1e-6)

    def gradients(module):
        def loss(params, x):
            return (module.apply({"params": params}, x) ** 2).sum()

        return jax.tree.leaves(cases.compiled(jax.grad(loss, (0, 1)))(params, x))

    for mine, its in zip(
        gradients(experts(capacity_factor=4.0)), gradients(experts()), strict=True
    ):
        np.testing.assert_allclose(mine, its, atol=1e-5)
        assert np.abs(mine).max() > 0


def test_tokens_beyond_an_experts_capacity_get_nothing_from_it(x, params):
    """All 12 tokens want expert 3 alone, which reads 12 / 4 = 3 of them: the first ones."""
    x = np.abs(x)
    towards = np.zeros_like(params["router"])
    towards[:, 3] = 9.0
    out, seen = ran(experts(top_k=1, capacity_factor=1.0), params | {"router": towards}, x)
    assert seen["dropped"] == pytest.approx(9 / 12)
    flat = out.reshape(12, WIDTH)
    np.testing.assert_allclose(flat[:3], one(params, 3, x.reshape(12, WIDTH)[:3]), atol=1e-5)
    assert not flat[3:].any()
    assert seen["balance"] == pytest.approx(4.0, rel=1e-3)  # as uneven as can be


def test_first_choices_get_slots_before_second_ones():
    chosen = jnp.array([[1, 0], [0, 1], [0, 1]])
    slot, fits = expert_slots(chosen, 2, 2)
    np.testing.assert_array_equal(slot, [[0, 2], [0, 1], [1, 2]])
    np.testing.assert_array_equal(fits, [[True, False], [True, True], [True, False]])


# --- In a model -----------------------------------------------------------------------------------


def mixed(**changes):
    return dataclasses.replace(SHAPE, moe=dataclasses.replace(MIX, **changes))


def hidden(shape, params, tokens):
    module = decoder.Decoder(shape, (policies.FULL,) * shape.num_layers)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    run = cases.compiled(lambda params: module.apply(params, tokens, positions=positions)[0])
    return run({"params": params})


def fresh(shape):
    return cases.compiled(lambda key: decoder.init(shape, key=key))(jax.random.key(0))


def test_one_expert_is_the_mlp():
    shape = mixed(experts=1, top_k=1, hidden_dim=32, shared_dim=0)
    params = specs.parameters(SHAPE)
    mlp = params["layers"]["mlp"]
    experts = {name: mlp[f"w_{name}"][:, None] for name in ("gate", "up", "down")}
    router = jax.random.normal(jax.random.key(2), (2, 16, 1))
    layers = {k: v for k, v in params["layers"].items() if k != "mlp"}
    layers["moe"] = experts | {"router": router}
    tokens = jnp.asarray(making.tokens()["tokens"][:2])
    found = hidden(shape, params | {"layers": layers}, tokens)
    np.testing.assert_allclose(found, hidden(SHAPE, params, tokens), atol=1e-5)


def test_parameters_are_counted():
    shape = mixed(dense_layers=1)
    params = jax.eval_shape(lambda key: decoder.init(shape, key=key), jax.random.key(0))
    assert set(params) == {"embed", "head", "first_layers", "layers", "final_norm"}
    assert params["first_layers"]["mlp"]["w_up"].shape == (1, 16, 32)
    assert params["layers"]["moe"]["up"].shape == (1, 4, 16, 24)
    assert params["layers"]["shared"]["w_down"].shape == (1, 8, 16)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert cost.parameters(shape) == total
    aside = 2 * 64 * 16 + 5 * 16 + 16 * 4  # vocabulary, norms, router
    assert cost.block_parameters(shape) == total - aside
    idle = 2 * 3 * 16 * 24
    assert cost.active_parameters(shape) == total - idle
    assert cost.block_parameters(shape, active=True) == total - aside - idle
    used = cost.active_parameters(shape) - 64 * 16 - 5 * 16  # an embedding is looked up
    assert cost.matmul_flops_per_token(shape) == 2 * used


def test_a_shape_that_leaves_no_mixture_is_refused():
    with pytest.raises(ValueError, match="dense_layers=2 leaves no layer"):
        mixed(dense_layers=2)
    with pytest.raises(ValueError, match="top_k=5 of 4 experts"):
        mixed(top_k=5)
    mlp = dataclasses.replace(SHAPE.mlp, bias=True)
    with pytest.raises(ValueError, match=r"biases of experts are moe\.bias"):
        dataclasses.replace(SHAPE, mlp=mlp, moe=MIX)


@pytest.mark.slow
@pytest.mark.parametrize("router", [TokenChoice(), Hash()])
def test_decoding_through_the_cache_equals_prefill(router):
    shape = mixed(dense_layers=1, router=router)
    params = fresh(shape)
    by_layer = (policies.FULL,) * 2
    module = decoder.Decoder(shape, by_layer)
    tokens = jnp.asarray(making.tokens()["tokens"][:2, :6])
    caches = decoder.init_caches(shape, by_layer, batch=2, capacity=8, dtype=jnp.float32)

    @cases.compiled
    def read(tokens, start, caches):
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        return module.apply({"params": params}, tokens, positions=positions, caches=caches)

    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
        found, caches = read(tokens[:, start:stop], jnp.int32(start), caches)
        parts.append(found)
    whole = hidden(shape, params, tokens)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.slow
def test_the_routers_losses_are_minimised_and_reported():
    objective = (terms.CrossEntropy(), terms.RouterBalance(0.5), terms.RouterZ(0.25))
    made = making.program(shape=mixed(), objective=objective)
    batch = making.put(made, making.tokens())
    weights = tuple(term.weight(batch) for term in objective)
    state = State(fresh(mixed()), None, None, None, None)
    total, reported = cases.compiled(made.loss_fn(state, batch, weights))(state.params)
    assert set(reported) == {"loss", *(f"router_{name}" for name in moe.MEASURES)}
    balance, z = (reported[f"router_{name}"] for name in ("balance", "z"))
    wanted = reported["loss"] + 0.5 * balance + 0.25 * z
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    assert 1 <= float(balance) < 4
