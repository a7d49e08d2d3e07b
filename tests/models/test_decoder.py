"""The decoder against one that runs layer after layer; causality, caches, remat, what is sown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import rope
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.errors import InputError
from lminf.models import decoder, heads, layers
from tests.attention import cases
from tests.models import specs

BATCH, TOKENS = 2, 20
# Layers add up what each of them rounds.
ATOL = 1e-5


def tokens_of(spec, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, spec.vocab_size, (BATCH, TOKENS), np.int32))


def embedded(spec, params, tokens, positions):
    x = params["embed"][tokens] * spec.embed_scale
    if spec.embed_norm:
        x = layers.Norm(spec.norm, spec.width).apply({"params": params["embed_norm"]}, x)
    if isinstance(spec.encoding, rope.Learnt):
        x = x + params["positions"][jnp.maximum(positions, 0) + spec.encoding.offset]
    return x


def layer_after_layer(spec, params, by_layer, tokens, positions):
    """Layer after layer, each with its own policy through the dense reference."""
    x = embedded(spec, params, tokens, positions)
    for index, policy in enumerate(by_layer):
        layer = jax.tree.map(lambda w, index=index: w[index], params["layers"])
        dense = cases.reference(policy, decoder.score_configs(spec)[index], positions)
        block = layers.Block(spec)
        x, _ = block.apply({"params": layer}, x, lambda *qkv, f=dense, **sinks: (
            f(*qkv, **sinks), None
        ))  # fmt: skip
    final = layers.Norm(spec.norm, spec.width)
    return final.apply({"params": params["final_norm"]}, x)


def read_in_pieces(module, params, tokens, positions, *, chunks, capacity=TOKENS):
    """Hidden states of tokens read through caches: pieces of these sizes, then one by one."""
    caches = decoder.init_caches(
        module.spec, module.policies, batch=len(tokens), capacity=capacity, dtype=module.dtype
    )
    outs, start = [], 0
    for size in chunks:
        piece = slice(start, start := start + size)
        out, caches = module.apply(
            {"params": params}, tokens[:, piece], positions=positions[:, piece], caches=caches
        )
        outs.append(out)

    def step(caches, token):
        token, position = token
        out, caches = module.apply(
            {"params": params}, token[:, None], positions=position[:, None], caches=caches
        )
        return caches, out[:, 0]

    _, last = jax.lax.scan(step, caches, (tokens[:, start:].T, positions[:, start:].T))
    return jnp.concatenate([*outs, last.swapaxes(0, 1)], 1)


MIXES = {
    "one": (specs.shallow(specs.OSS, 2), (LMInfinite(5, 2),) * 2),
}
SLOW_MIXES = {
    "two": (specs.OLMO, (Window(4), SelfExtend(5, 3)) * 2),
    "three": (
        specs.shallow(specs.GEMMA, 3),
        (LMInfinite(5, 2), ReRoPE(4, log_from=9), PerHead((Streaming(6, 1), Full()))),
    ),
    "neox": (specs.NEOX, (Streaming(5, 3),) * 4),
    "mpt": (specs.MPT, (LMInfinite(5, 3), Full()) * 2),
    "qwen": (specs.QWEN, (PerHead((LeakyReRoPE(4, 3), Lambda(6, 1))),) * 4),
    "odd": (specs.ODD, (Lambda(5, 2), Lambda(5, 2), Lambda(5, 2), Window(3))),
    "gpt2": (specs.GPT2, (Lambda(5, 2), Full(), Window(3), Full())),
    "gptj": (specs.shallow(specs.GPTJ, 2), (LMInfinite(5, 2),) * 2),
    "sinks": (
        specs.shallow(specs.OSS, 3),
        (PerHead((Streaming(6, 1), Full())), ReRoPE(4, log_from=9), SelfExtend(5, 3)),
    ),
    "llama": (specs.LLAMA, (Window(4), SelfExtend(5, 3)) * 2),
    "full": (specs.GEMMA, (Window(6), Full()) * 2),
}


@pytest.mark.parametrize(
    "name", [*MIXES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MIXES)]
)
def test_every_layer_attends_as_its_policy_says_at_once_and_through_caches(name):
    spec, by_layer = (MIXES | SLOW_MIXES)[name]
    module, chunks = decoder.Decoder(spec, by_layer), () if name == "three" else (9,)
    positions = jnp.asarray(cases.padded((0, 3), TOKENS))

    @cases.compiled
    def run(params, tokens):
        return (
            layer_after_layer(spec, params, by_layer, tokens, positions),
            module.apply({"params": params}, tokens, positions=positions)[0],
            read_in_pieces(module, params, tokens, positions, chunks=chunks),
        )

    expected, whole, read = run(specs.parameters(spec), tokens_of(spec))
    real = np.asarray(positions) >= 0
    for found in (whole, read):
        np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=ATOL)


def test_policies_by_content_and_encoders_are_refused_where_heads_have_sinks():
    tokens = jnp.zeros((1, 2), jnp.int32)

    def init(policy, **options):
        module = decoder.Decoder(specs.OSS, (policy,) * 4)
        jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, positions=tokens, **options))

    with pytest.raises(InputError, match="have learnt sinks, which it does not count"):
        init(TopK(4, 1, 2))
    with pytest.raises(InputError, match="learnt sinks attend to earlier tokens"):
        init(Full(), bidirectional=True)


def test_the_period_is_the_shortest_that_repeats():
    a, b = Full(), Window(3)
    for pattern, period in {(a,): 1, (a, a, a): 1, (a, b, a, b): 2, (a, b, a): 3, (a, a, b): 3,
                            (a, a, a, b): 4, (a, b, b, a, b, b): 3}.items():  # fmt: skip
        count = len(pattern)
        spec = dataclasses.replace(specs.LLAMA, num_layers=count, windows=(None,) * count)
        assert decoder.period_of(spec, pattern) == period
    own = dataclasses.replace(specs.LLAMA, layer_encodings=(None, None, None, rope.NoEncoding()))
    assert decoder.period_of(own, (a,) * 4) == 4


def test_a_pattern_that_does_not_divide_the_dense_layers_is_refused():
    module = decoder.Decoder(specs.MIXED, (Window(4), Full()) * 2)  # one dense layer, then three
    params, tokens = specs.parameters(specs.MIXED), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(InputError, match="2 policies does not divide the 1 layers of one kind"):
        jax.eval_shape(lambda p: module.apply({"params": p}, tokens, positions=tokens), params)


def test_caches_are_one_for_each_layer_of_a_period():
    by_layer = (Window(4), Full()) * 2
    ring, append = decoder.init_caches(
        specs.LLAMA, by_layer, batch=3, capacity=50, dtype=jnp.bfloat16
    )
    assert ring.k.shape == ring.v.shape == (2, 3, 4, 2, 8)
    assert append.k.shape == (2, 3, 50, 2, 8)
    assert append.k.dtype == jnp.bfloat16


# --- What a token depends on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by_layer", "reach"),
    [
        ((Full(),) * 2, TOKENS),
        ((Lambda(3, 0), LMInfinite(4, 2)), 2 + 3),  # a window of w looks back w - 1 tokens
        pytest.param((Window(3), Window(4)), 2 + 3, marks=pytest.mark.slow),
    ],
)
def test_a_token_depends_on_those_that_its_layers_reach_and_on_no_later_one(by_layer, reach):
    spec = specs.shallow(specs.LLAMA, 2)
    params = specs.parameters(spec)
    module = decoder.Decoder(spec, by_layer)
    tokens = jnp.arange(TOKENS, dtype=jnp.int32)[None]  # all different: a row of embed is a token
    positions = tokens

    @cases.compiled
    def sensitivity(embed, at):
        def score(embed):
            hidden, _ = module.apply(
                {"params": {**params, "embed": embed}}, tokens, positions=positions
            )
            return (hidden[0, at] * jnp.arange(1.0, spec.width + 1)).sum()

        return jnp.abs(jax.grad(score)(embed)).max(-1)[:TOKENS]

    sinks = max(part.num_sinks or 0 for part in by_layer)
    for at in (0, 3, 9, TOKENS - 1):
        found = np.asarray(sensitivity(params["embed"], at))
        back = [j for j in range(at + 1) if at - j <= reach or j < sinks]
        assert set(np.flatnonzero(found)) == set(back)


@pytest.mark.slow
def test_padding_changes_no_gradient():
    """Every parameter's gradient of a padded row is that of the row without padding."""
    spec = specs.shallow(specs.LLAMA, 2)
    module = decoder.Decoder(spec, (ReRoPE(3, log_from=4), LMInfinite(4, 2)))
    params, pad = specs.parameters(spec), 4
    tokens = tokens_of(spec)[:1]

    def loss(params, tokens, positions):
        hidden, _ = module.apply({"params": params}, tokens, positions=positions)
        return jnp.where(positions[..., None] >= 0, jnp.sin(hidden), 0.0).sum()

    @cases.compiled
    def run(params, tokens):
        long = jnp.arange(TOKENS, dtype=jnp.int32)[None] - pad
        return (
            jax.grad(loss)(params, tokens, long),
            jax.grad(loss)(params, tokens[:, pad:], long[:, pad:]),
        )

    padded, alone = run(params, tokens)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# --- Rematerialisation, sowing, dtypes ------------------------------------------------------------


@pytest.mark.slow
def test_rematerialised_layers_give_the_same_values_and_gradients():
    spec = specs.shallow(specs.LLAMA, 2)
    params, tokens = specs.parameters(spec), tokens_of(spec)[:, :8]
    positions = jnp.asarray(cases.padded((0, 2), 8))

    def loss(params, remat):
        module = decoder.Decoder(spec, (LMInfinite(3, 1),) * 2, remat=remat)
        hidden, _ = module.apply({"params": params}, tokens, positions=positions)
        return jnp.sin(hidden).sum()

    @cases.compiled
    def run(params):
        nothing = jax.checkpoint_policies.nothing_saveable
        return [jax.value_and_grad(loss)(params, remat) for remat in (None, nothing)]

    kept, again = run(params)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_intermediates_are_sown_when_asked_for_and_cost_nothing_otherwise():
    spec, by_layer = specs.LLAMA, (Window(4), Full()) * 2
    module, params, tokens = (
        decoder.Decoder(spec, by_layer),
        specs.parameters(spec),
        tokens_of(spec),
    )
    positions = jnp.asarray(cases.padded((0, 3), TOKENS))

    @cases.compiled
    def watched(params):
        (hidden, _), sown = module.apply(
            {"params": params}, tokens, positions=positions, mutable=["intermediates"]
        )
        norm = layers.Norm(spec.norm, spec.width)
        before = jax.tree.map(lambda w: w[0], params["layers"]["attention_norm"])
        first = norm.apply({"params": before}, params["embed"][tokens])
        q = jnp.einsum("btd,dnh->btnh", first, params["layers"]["attention"]["wq"][0])
        last = sown["intermediates"]["layers"]["hidden"][0][-1]
        last = norm.apply({"params": params["final_norm"]}, last)
        return sown["intermediates"], (q, last), hidden

    sown, (q, last), hidden = watched(params)
    L, N, K, H = spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim
    assert jax.tree.map(jnp.shape, sown) == {
        "layers": {
            "attention": {
                "q": ((L, BATCH, TOKENS, N, H),),
                "k": ((L, BATCH, TOKENS, K, H),),
                "v": ((L, BATCH, TOKENS, K, H),),
            },
            "hidden": ((L, BATCH, TOKENS, spec.width),),
        }
    }
    # In the order of the layers: queries of the first, and the state that the last norm takes.
    np.testing.assert_allclose(sown["layers"]["attention"]["q"][0][0], q, atol=1e-5)
    np.testing.assert_allclose(last, hidden, atol=1e-6)

    def quiet(params):
        return module.apply({"params": params}, tokens, positions=positions)[0]

    # Not asked for: the scan over layers carries the hidden state and stacks nothing.
    scans = [e for e in jax.make_jaxpr(quiet)(params).eqns if e.primitive.name == "scan"]
    assert [[out.aval.shape for out in scan.outvars] for scan in scans] == [
        [(BATCH, TOKENS, spec.width)]
    ]


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    spec, by_layer = specs.LLAMA, (LMInfinite(5, 2),) * 4
    positions = jnp.asarray(cases.padded((0, 3), TOKENS))

    @cases.compiled
    def run(params, tokens):
        return [
            decoder.Decoder(spec, by_layer, dtype=dtype).apply(
                {"params": params}, tokens, positions=positions
            )[0]
            for dtype in (jnp.float32, jnp.bfloat16)
        ]

    full, half = run(specs.parameters(spec), tokens_of(spec))
    assert half.dtype == jnp.bfloat16
    # Four layers of rounding to 8 bits, of hidden states of order 1.
    np.testing.assert_allclose(np.asarray(half, np.float32), full, atol=0.1)


def test_logits_are_capped_biased_and_float32():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.bfloat16)
    for spec in (specs.GEMMA, specs.GPTJ):
        params = specs.parameters(spec)
        head = np.asarray(params["embed" if spec.tied else "head"].astype(jnp.bfloat16), np.float64)
        expected = np.asarray(hidden, np.float64) @ head.T
        if spec.head_bias:
            expected += np.asarray(params["head_bias"])
        if spec.final_soft_cap:
            expected = spec.final_soft_cap * np.tanh(expected / spec.final_soft_cap)
        found = cases.compiled(lambda p, h, spec=spec: heads.lm(spec, p, h))(params, hidden)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_packed_texts_are_separate_texts():
    spec = specs.shallow(specs.LLAMA, 2)
    module = decoder.Decoder(spec, (LMInfinite(4, 2),) * 2)
    params, tokens = specs.parameters(spec), tokens_of(spec)[:1]
    lengths = (7, 13)

    @cases.compiled
    def run(params, tokens):
        def hidden(tokens, positions, segments=None):
            return module.apply({"params": params}, tokens, positions=positions, segments=segments)[
                0
            ]

        own = [jnp.arange(n, dtype=jnp.int32)[None] for n in lengths]
        segments = jnp.repeat(jnp.arange(2), np.array(lengths), total_repeat_length=TOKENS)[None]
        packed = hidden(tokens, jnp.concatenate(own, 1), segments)
        alone = [hidden(tokens[:, :7], own[0]), hidden(tokens[:, 7:], own[1])]
        return packed, jnp.concatenate(alone, 1)

    packed, alone = run(params, tokens)
    np.testing.assert_allclose(packed, alone, atol=ATOL)
