"""Each router against its formula, written out in NumPy; and which of them see later tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import policy as policies
from lminf.errors import InputError
from lminf.models import cost, decoder, routers
from lminf.models.routers import ExpertChoice, Hash, LossFree, TokenChoice
from tests.attention import cases
from tests.models import specs
from tests.models.test_moe import MIX, experts, mixed, one, ran
from tests.train import making

CHOOSING = {"router": ExpertChoice()}
FLAT = (12, 16)  # the tokens of x, and its width


def softmax(logits):
    share = np.exp(logits - logits.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def test_where_experts_choose_each_reads_its_even_share_of_the_tokens(x, params):
    """12 tokens, 4 experts, 2 experts a token on average: each expert reads 6 tokens."""
    out, seen = ran(experts(**CHOOSING), params, x)
    flat = x.reshape(FLAT)
    scores = softmax(flat @ params["router"])
    wanted, readers = np.zeros_like(flat), np.zeros(12)
    for expert in range(4):
        for token in sorted(range(12), key=lambda t: -scores[t, expert])[:6]:
            wanted[token] += scores[token, expert] * one(params, expert, flat[token])
            readers[token] += 1
    np.testing.assert_allclose(out.reshape(FLAT), wanted, atol=1e-6)
    assert readers.sum() == 24
    assert readers.max() > 2  # of one token; of others none or one
    assert seen["unread"] == pytest.approx((readers == 0).mean())
    assert seen["largest"] == pytest.approx(1 / 4)


def test_a_hashed_token_is_read_by_the_experts_that_its_id_says(x, params):
    def finalised(h):  # MurmurHash3's, in Python's integers
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return h ^ (h >> 16)

    tokens = np.array([[0, 1, 2, 3, 255, 1], [65, 2**31 - 1, 5, 7, 11, 13]])
    module = experts(router=Hash())
    without = {name: w for name, w in params.items() if name != "router"}
    ids = jnp.asarray(tokens, jnp.int32)
    out = cases.compiled(module.apply)({"params": without}, jnp.asarray(x), ids)
    for b, t in ((0, 0), (0, 1), (0, 5), (1, 1)):
        first = finalised(int(tokens[b, t])) % 4
        wanted = sum(one(params, (first + i) % 4, x[b, t]) for i in range(2)) / 2
        np.testing.assert_allclose(out[b, t], wanted, atol=1e-6)


def test_a_correction_bias_changes_the_choice_and_not_the_weights(x, params):
    bias = np.array([0, 0, 3, 0], np.float32)  # beyond any probability: expert 2 comes first
    out, seen = ran(experts(router=LossFree(), top_k=1), params | {routers.BIAS: bias}, x)
    flat = x.reshape(FLAT)
    weight = softmax(flat @ params["router"])[:, 2:3]
    np.testing.assert_allclose(out.reshape(FLAT), weight * one(params, 2, flat), atol=1e-6)
    assert seen["largest"] == 1


def test_biases_move_by_the_sign_of_the_load_error():
    """Algorithm 1 of arXiv:2408.15664: up where fewer tokens than the mean, else down."""
    before = {"layers": {"moe": {routers.BIAS: jnp.array([[0.1, 0.2, 0.3, 0.4]])}}}
    load = jnp.array([[0.5, 0.25, 0.15, 0.1]])
    after = routers.update_bias(before, 0.01, load)["layers"]["moe"][routers.BIAS]
    np.testing.assert_allclose(after, [[0.09, 0.2, 0.31, 0.41]], rtol=1e-6)


def change_of_earlier_states(shape):
    """How far the last token of a text, of every id, moves the hidden states of those before it."""
    texts = np.repeat(making.tokens()["tokens"][None, :1], shape.vocab_size, 0)
    texts[:, 0, -1] = np.arange(shape.vocab_size)
    module, params = decoder.Decoder(shape, (policies.FULL,) * 2), specs.parameters(shape)
    positions = jnp.arange(texts.shape[2], dtype=jnp.int32)[None]

    @cases.compiled
    @jax.vmap  # each text is a batch of its own: rows of one are compared with each other too
    def read(tokens):
        return module.apply({"params": params}, tokens, positions=positions)[0]

    change = np.abs(np.diff(np.asarray(read(jnp.asarray(texts)))[:, 0], axis=0))
    assert change[:, -1].max() > 1e-3
    return change[:, :-1].max()


def test_where_experts_choose_earlier_tokens_depend_on_later_ones():
    """The leak that makes its loss no loss of a language model."""
    assert change_of_earlier_states(mixed(**CHOOSING)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("router", [TokenChoice(), LossFree(), Hash()])
def test_under_other_routers_no_token_depends_on_later_ones(router):
    assert router.causal
    assert change_of_earlier_states(mixed(router=router)) == 0


@pytest.mark.slow
def test_an_expert_that_is_full_lets_later_tokens_displace_second_choices():
    """All first choices get slots before second ones, so a capacity leaks too, if less."""
    assert change_of_earlier_states(mixed(capacity_factor=1.0)) > 1e-3
    assert change_of_earlier_states(mixed(capacity_factor=1.0, top_k=1)) == 0


def test_a_router_that_sees_later_tokens_does_not_decode():
    shape = mixed(**CHOOSING)
    with pytest.raises(InputError, match=r"where experts choose, they compare a token with later"):
        decoder.init_caches(shape, (policies.FULL,) * 2, batch=1, capacity=8, dtype=jnp.float32)
    with pytest.raises(InputError, match=r"set capacity_factor=None and normalised=False"):
        mixed(**CHOOSING, capacity_factor=1.0)


def test_hash_routing_refuses_embeddings():
    shape = mixed(router=Hash())
    module = decoder.Decoder(shape, (policies.FULL,) * 2)
    shapes = jax.eval_shape(lambda key: decoder.init(shape, key=key), jax.random.key(0))
    assert "router" not in shapes["layers"]["moe"]
    with pytest.raises(InputError, match="hash routing goes by token ids"):
        jax.eval_shape(
            lambda p: module.apply(
                {"params": p}, embeds=jnp.zeros((1, 4, 16)), positions=jnp.zeros((1, 4), jnp.int32)
            ),
            shapes,
        )


def test_fine_grained_experts_have_as_many_parameters_in_all_and_for_each_token():
    whole = dataclasses.replace(MIX, shared_dim=0)
    fine = whole.fine_grained(pieces=4, shared=1)
    assert (fine.experts, fine.top_k, fine.hidden_dim, fine.shared_dim) == (15, 7, 6, 6)
    shapes = [dataclasses.replace(mixed(), moe=mixture) for mixture in (whole, fine)]
    for active in (False, True):
        first, second = (cost.block_parameters(shape, active=active) for shape in shapes)
        assert first == second
    routers_differ = 2 * 2 * 16 * (15 - 4)  # FLOPs: of two layers, a product of 16 rows
    products = [cost.matmul_flops_per_token(shape) for shape in shapes]
    assert products[1] - products[0] == routers_differ
    with pytest.raises(InputError, match="5 pieces do not divide an expert of 24 channels"):
        whole.fine_grained(pieces=5, shared=0)
    with pytest.raises(InputError, match="8 shared of the 8 pieces that a token uses"):
        whole.fine_grained(pieces=4, shared=8)
