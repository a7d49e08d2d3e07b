"""Layers that run one by one, as on a CPU, against the scan over them that other devices run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lminf.attention.policies.eviction import SirLLM
from lminf.attention.policies.hip import HiP, InfiniteHiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import Full, Lambda, LMInfinite
from lminf.data.tokenizers import ByteTokenizer
from lminf.lm import layerwise
from lminf.lm.lm import LM
from lminf.models import decoder
from tests.attention import cases
from tests.models import specs

TEXT = "Some forty bytes of text to be predicted."
POLICIES = [
    None,  # the fixture's own, one layer that forgets and one that does not
    pytest.param(InfLLM(8, 2, topk=2, block=4, exec_block=8), marks=pytest.mark.slow),
    pytest.param(SirLLM(32, recent=8, turn=16), marks=pytest.mark.slow),
]


@pytest.fixture
def scanned(monkeypatch):
    """Makes a model that reads and writes as on an accelerator."""

    def make(lm):
        monkeypatch.setattr(layerwise, "PLATFORMS", ())
        return dataclasses.replace(lm)

    return make


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_losses_and_answers_are_those_of_the_scan(lm, small_steps, scanned, policy):
    lm = lm if policy is None else lm.with_policy(policy)
    ids = lm.tokenizer.encode(TEXT)
    losses, answer = lm.token_nll(ids), lm.generate(TEXT, max_new_tokens=8)
    assert len(lm.init_caches(batch=1, capacity=32)) == lm.spec.num_layers
    other = scanned(lm)
    np.testing.assert_allclose(other.token_nll(ids), losses, atol=1e-5)
    assert other.generate(TEXT, max_new_tokens=8) == answer


INFINITE_HIP = InfiniteHiP((8, 2), (8, 4), (4, 2), window=8, sinks=2, query_block=8)


def by_layers(layers: int) -> list:
    """Policies that do in so many layers at the start what they do not do in the others."""
    return [
        TopK(8, sinks=2, topk=3, from_layer=layers),
        HiP(topk=4, window=8, sinks=2, query_block=8, refresh=1, dense_layers=layers),
        dataclasses.replace(INFINITE_HIP, dense_layers=layers),
        dataclasses.replace(INFINITE_HIP, ordered_layers=layers),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(4), ids=["topk", "hip", "infinite_hip", "ordered"])
def test_a_policy_does_in_each_layer_what_it_says_of_it(kind, scanned):
    """With a cache for each layer, with one for all, and without: of no layer, one, and all."""
    spec = dataclasses.replace(specs.shallow(specs.LLAMA, 3), vocab_size=257, trained_length=64)
    lm = LM(spec, specs.parameters(spec), ByteTokenizer())
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40)).astype(np.int32)
    positions = np.arange(40, dtype=np.int32)[None]

    def last_hidden(lm):
        caches = lm.init_caches(batch=1, capacity=40)
        return np.asarray(lm.forward(tokens, positions, caches)[0][0, -1])

    found = []
    for layers in (0, 1, 3):
        one = lm.with_policy(by_layers(layers)[kind])
        found.append(last_hidden(one))
        assert isinstance(one.forward, layerwise.LayerwiseDecoder)
        apply = cases.compiled(lambda *args, one=one: one.decoder.apply(
            {"params": lm.params}, *args[:1], positions=args[1])[0])  # fmt: skip
        np.testing.assert_allclose(apply(tokens, positions)[0, -1], found[-1], atol=1e-5)
    assert min(abs(found[1] - other).max() for other in (found[0], found[2])) > 1e-4
    if kind < 3:
        everywhere = LMInfinite(8, 2) if kind == 0 else Full()
        np.testing.assert_allclose(last_hidden(lm.with_policy(everywhere)), found[2], atol=1e-5)
    one = scanned(lm.with_policy(by_layers(1)[kind]))
    assert not isinstance(one.forward, layerwise.LayerwiseDecoder)
    np.testing.assert_allclose(last_hidden(one), found[1], atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(specs.shallow(specs.OSS, 1), marks=pytest.mark.slow),
        pytest.param(specs.shallow(specs.OLMO, 2), marks=pytest.mark.slow),
        pytest.param(specs.shallow(specs.GPT2, 2), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(specs.MIXED, trained_length=64), marks=pytest.mark.slow),
    ],
    ids=lambda spec: spec.family,
)
def test_layers_of_every_kind_run_alone_as_in_the_scan(spec, scanned):
    """Sinks, encodings of a layer's own, learnt positions, experts after an MLP."""
    lm = LM(spec, specs.parameters(spec), None, Lambda(6, 2))
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, 31)
    losses = lm.token_nll(ids)
    np.testing.assert_allclose(scanned(lm).token_nll(ids), losses, atol=1e-5)


@pytest.mark.slow
def test_the_scan_shares_out_a_chunk_too(lm, small_steps, scanned):
    ids = lm.tokenizer.encode(TEXT)
    losses = lm.token_nll(ids)
    shared = scanned(lm.with_devices(jax.devices()[:2]))
    np.testing.assert_allclose(shared.token_nll(ids), losses, atol=1e-5)


def test_a_layer_has_no_copy_of_its_weights(lm):
    for name, stacked in lm.params["layers"]["mlp"].items():
        start = stacked.unsafe_buffer_pointer()
        for row, layer in enumerate(lm.forward.by_layer):
            address = layer["mlp"][name].unsafe_buffer_pointer()
            assert address == start + row * stacked[0].nbytes


def test_devices_of_one_cpu_share_the_weights(lm):
    shared = lm.with_devices(jax.devices()[:2]).replicated_params
    for x, on_both in zip(jax.tree.leaves(lm.params), jax.tree.leaves(shared), strict=True):
        for shard in on_both.addressable_shards:
            assert shard.data.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()


def test_layers_run_one_by_one_where_one_device_has_all_of_them(lm):
    """On a mesh each layer would wait for the other devices: XLA ran out of threads that wait."""
    two = jax.devices()[:2]
    assert isinstance(lm.forward, layerwise.LayerwiseDecoder)
    assert not isinstance(lm.with_devices(two).forward, layerwise.LayerwiseDecoder)
    spread = jax.device_put(lm.params, NamedSharding(Mesh(np.array(two), "x"), P()))
    assert not isinstance(
        dataclasses.replace(lm, params=spread).forward, layerwise.LayerwiseDecoder
    )


@pytest.mark.parametrize("policy", [Full(), LMInfinite(2048, 4)], ids=str)
def test_a_token_is_read_without_a_copy_of_its_layers_cache(policy):
    spec = specs.shallow(specs.LLAMA, 1)
    program = layerwise.layer_program(spec, policy, decoder.score_configs(spec)[0], None)
    params = jax.eval_shape(lambda: decoder.init(spec, key=jax.random.key(0)))["layers"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)

    def prepared():
        caches = decoder.init_caches(spec, (policy,), batch=1, capacity=2048, dtype=jnp.float32)
        return decoder.prepare_decoding(spec, (policy,), caches, length=0, room=0)[0].for_decoding()

    cache = jax.eval_shape(prepared)
    x = jax.ShapeDtypeStruct((1, 1, spec.width), jnp.float32)
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = program.lower(params, x, position, cache).compile(cases.fast_options())
    memory = memory.memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (cache.k, cache.v))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_the_surprise_of_a_token_is_computed_once_for_all_layers(lm):
    """The head's product is most of what it costs."""
    lm = lm.with_policy(SirLLM(32, recent=8, turn=16))
    caches, tokens = lm.init_caches(batch=1, capacity=32), jnp.zeros((1, 1), jnp.int32)
    assert len(caches) > 1
    observe = layerwise.observe_program(lm.spec, lm.decoder.policies)
    hidden = jnp.zeros((1, 1, lm.spec.width))
    program = str(jax.make_jaxpr(observe)(lm.params, caches, tokens, tokens, hidden))
    assert program.count("dot_general") == 1
