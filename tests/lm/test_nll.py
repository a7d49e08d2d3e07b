"""Losses of texts: through the cache, in chunks, and what is made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import rope
from lminf.attention.policy import Full, LMInfinite, PerHead, SelfExtend, Window
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm.lm import LM
from lminf.lm.nll import NLL, bits_per_byte
from lminf.models import heads
from lminf.objectives import cross_entropy
from tests.attention import cases
from tests.models import specs

TEXT = "Straße: forty-one tokens, a few in bytes"  # ß is two bytes


@pytest.fixture(scope="module")
def one_shot(lm):
    """NLL of the tokens 1.. from the logits of the whole text at once."""

    @cases.compiled
    def run(params, tokens):
        at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden, _ = lm.decoder.apply({"params": params}, tokens, positions=at)
        log_p = jax.nn.log_softmax(heads.lm(lm.spec, params, hidden))
        return -jnp.take_along_axis(log_p[0, :-1], tokens[0, 1:, None], axis=1)[:, 0]

    ids = lm.tokenizer.encode(TEXT)
    return np.asarray(run(lm.params, ids[None]))


def test_losses_through_the_cache_are_those_of_the_whole_text(lm, one_shot, small_steps):
    ids, calls = lm.tokenizer.encode(TEXT), []
    found = lm.token_nll(ids, progress=lambda done, of: calls.append((done, of)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_shot, atol=1e-5)
    assert calls == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.parametrize(("policy", "first"), [("full", 8), ("lm_infinite:window=8,sinks=2", 16)])
def test_a_text_that_is_kept_whole_is_read_in_smaller_chunks(
    lm, small_steps, monkeypatch, policy, first
):
    monkeypatch.setattr("lminf.lm.nll.UNBOUNDED_CHUNK", 8)
    ids, calls = lm.tokenizer.encode(TEXT), []
    lm.with_policy(policy).token_nll(ids, progress=lambda done, of: calls.append(done))
    assert calls[0] == first


def test_devices_that_read_together_never_hold_all_keys(lm):
    """Full has 32 slots, the window with its sinks 10."""
    caches = lm.with_devices(jax.devices()[:2]).init_caches(batch=1, capacity=32)
    assert [layer.pos.shape[1] for layer in caches] == [10, 32]
    for layer in caches:
        for x in (layer.k, layer.v):
            (first, second) = (shard.data.shape[2] for shard in x.addressable_shards)
            assert first == second == x.shape[2] / 2


# Three do not divide a chunk: each reads it whole.
@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_devices(lm, one_shot, small_steps, devices):
    ids = lm.tokenizer.encode(TEXT)
    found = lm.with_devices(jax.devices()[:devices]).token_nll(ids)
    np.testing.assert_allclose(found, one_shot, atol=1e-5)


def test_weights_are_copied_to_other_devices_once(lm):
    first = lm.with_devices(jax.devices()[:2])
    other = first.with_policy(Window(8))
    assert other.replicated_params is first.replicated_params
    changed = dataclasses.replace(first, params={**lm.params, "embed": lm.params["embed"] + 1})
    assert (changed.replicated_params["embed"] != first.replicated_params["embed"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33])
def test_losses_of_texts_of_any_length(lm, one_shot, small_steps, length):
    found = lm.token_nll(lm.tokenizer.encode(TEXT)[:length])
    np.testing.assert_allclose(found, one_shot[: length - 1], atol=1e-5)


def test_a_stream_in_pieces_of_any_size_is_the_text(lm, one_shot, small_steps):
    ids = lm.tokenizer.encode(TEXT)
    pieces = np.split(ids, [1, 1, 2, 20, 36])  # an empty one too
    found = list(lm.stream_nll(pieces, longest=len(ids)))
    assert [len(losses) for losses in found] == [16, 16, 8]
    np.testing.assert_allclose(np.concatenate(found), one_shot, atol=1e-5)
    assert list(lm.stream_nll([], longest=9)) == list(lm.stream_nll([ids[:1]], longest=9)) == []


def test_a_policy_that_keeps_everything_needs_the_length_of_a_stream(lm, small_steps):
    ids = lm.tokenizer.encode(TEXT)
    with pytest.raises(InputError, match="keeps every token, so a stream needs longest="):
        list(lm.stream_nll([ids]))
    with pytest.raises(InputError, match="more than longest=40 tokens came, and per_layer"):
        list(lm.stream_nll([ids], longest=40))


@pytest.mark.slow
def test_a_policy_with_a_window_reads_without_end(lm, small_steps):
    bounded = lm.with_policy(LMInfinite(8, 2))
    ids = np.tile(bounded.tokenizer.encode(TEXT), 9)
    open_ended = np.concatenate(list(bounded.stream_nll(iter(np.array_split(ids, 7)))))
    np.testing.assert_allclose(open_ended, bounded.token_nll(ids), atol=1e-6)
    assert len(open_ended) == len(ids) - 1


def test_nll_of_a_text_counts_its_bytes(lm, one_shot, small_steps):
    nll = lm.nll(TEXT)
    np.testing.assert_allclose(nll.token_nll, one_shot, atol=1e-5)
    assert nll.token_bytes.sum() == len(TEXT.encode()) - 1  # the first token is not predicted
    assert nll.mean == pytest.approx(one_shot.mean(), abs=1e-5)
    assert nll.bits_per_byte == pytest.approx(one_shot.sum() / np.log(2) / 40, abs=1e-4)
    part = lm.nll(TEXT, length=35)
    np.testing.assert_allclose(part.token_nll, one_shot[:34], atol=1e-5)


def test_a_bos_token_makes_the_first_token_count(lm, small_steps):
    tokenizer = ByteTokenizer()
    object.__setattr__(tokenizer, "add_bos", True)
    with_bos = dataclasses.replace(lm, tokenizer=tokenizer)
    ids, ends = with_bos.encode("aß")
    assert ids.tolist() == [256, 97, 195, 159]
    assert ids.dtype == np.int32
    assert ends.tolist() == [0, 1, 2, 3]
    nll = with_bos.nll(TEXT)
    assert len(nll.token_nll) == nll.token_bytes.sum() == len(TEXT.encode())


def test_losses_are_those_of_all_logits():
    """Values and gradients, of a head with a bias and a soft cap."""
    spec, rng = specs.change(specs.GPTJ, final_soft_cap=2.0), np.random.default_rng(0)
    hidden = rng.normal(size=(2, 9, spec.width)).astype(np.float32)
    targets = rng.integers(0, spec.vocab_size, (2, 9), np.int32)
    weights = rng.normal(size=(2, 9)).astype(np.float32)
    params = {name: specs.parameters(spec)[name] for name in ("embed", "head", "head_bias")}

    def dense(params, hidden):
        log_p = jax.nn.log_softmax(heads.lm(spec, params, hidden))
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

    def by_kernel(params, hidden):
        return cross_entropy.token_nll(spec, params, hidden, jnp.asarray(targets))

    @cases.compiled
    def run(params, hidden):
        def both(loss):
            out, pull = jax.vjp(loss, params, hidden)
            return out, pull(jnp.asarray(weights))

        return both(dense), both(by_kernel)

    expected, found = run(params, jnp.asarray(hidden))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- Arithmetic -----------------------------------------------------------------------------------


def test_blocks_are_means_over_positions_of_the_text():
    nll = NLL(np.arange(1, 10, dtype=np.float32), np.ones(9, int))  # positions 1 to 9
    assert nll.blocks(4) == [(1 + 2 + 3) / 3, (4 + 5 + 6 + 7) / 4, (8 + 9) / 2]
    assert nll.blocks(5) == [2.5, 7.0]
    assert nll.blocks(100) == [5.0]
    assert nll.blocks(1) == list(range(1, 10))  # position 0 has no loss


def test_bits_per_byte_is_total_bits_over_total_bytes():
    nll = NLL(np.array([np.log(2), 3 * np.log(2)], np.float32), np.array([1, 3]))
    assert nll.bits_per_byte == pytest.approx(1.0)
    assert nll.mean == pytest.approx(2 * np.log(2))


def test_means_of_long_texts_are_summed_in_float64():
    nll = NLL(np.full(2**25, 0.1, np.float32), np.ones(2**25, np.int8))
    assert nll.mean == pytest.approx(np.float32(0.1), rel=1e-12)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("", None, "the text is empty"),
        ("a", None, "1 tokens: nothing to predict; give at least 2"),
        ("abc", 9, "the text has 3 tokens but length=9 was asked for; give a longer text"),
        ("abc", 1, "1 tokens: nothing to predict"),
        ("abc", 0, "length=0: give at least 2 tokens"),
        ("abc", -2, "length=-2: give at least 2 tokens"),
        ("a\ud800", None, "half of a surrogate pair"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(lm, text, length, message):
    with pytest.raises(InputError, match=message):
        lm.nll(text, length=length)


def test_policies_that_the_model_cannot_run_are_refused(lm):
    with pytest.raises(InputError, match="window=33 but this model was trained at 32 tokens"):
        lm.with_policy(Window(33))
    with pytest.raises(InputError, match="3 head policies but the model has 2 key/value heads"):
        lm.with_policy(PerHead((Full(),) * 3))
    scaled = lm.with_scaling(rope.Linear(2.0))
    assert scaled.context_length == 64
    assert scaled.with_policy(Window(64)).spec.encoding.scaling == rope.Linear(2.0)
    with pytest.raises(InputError, match="trained at 64 tokens"):
        scaled.with_policy(SelfExtend(65, 2))
    alibi = dataclasses.replace(lm, spec=specs.change(lm.spec, encoding=rope.Alibi(8.0)))
    with pytest.raises(InputError, match="this model's positions are Alibi, not rotary"):
        alibi.with_scaling(rope.Linear(2.0))


# --- A model as a value ---------------------------------------------------------------------------


def test_learnt_positions_refuse_longer_texts_and_policies_that_move_keys():
    lm = LM(specs.GPT2, {}, ByteTokenizer())  # 32 positions
    for policy in ("lm_infinite:window=8,sinks=2", "streaming:window=8,sinks=2", "rerope:window=8"):
        with pytest.raises(InputError, match=r"moves keys .* this model's positions are Learnt"):
            lm.with_policy(policy)
    lm.with_policy("lambda:window=8,sinks=2").check_positions(32)
    with pytest.raises(InputError, match="has learnt 32 positions"):
        lm.token_nll(np.zeros(34, np.int32))
    with pytest.raises(InputError, match="has learnt 32 positions"):
        lm.check_length(34)


def test_a_policy_may_be_given_as_text(lm, monkeypatch):
    policy = LMInfinite(window=8, sinks=2)
    assert lm.with_policy("lm_infinite:window=8,sinks=2") == lm.with_policy(policy)
    loaded = checkpoints.Checkpoint(lm.spec, lm.params, lm.tokenizer, "here")
    monkeypatch.setattr(checkpoints, "load", lambda name, **_: loaded)
    assert LM.from_pretrained("m", policy="lm_infinite:window=8,sinks=2").policy == policy
    assert LM.from_pretrained("m").policy == Full()
    with pytest.raises(InputError, match="'lm_infinit'; did you mean 'lm_infinite'"):
        LM.from_pretrained("m", policy="lm_infinit:window=8")


def test_a_model_prints_as_three_lines(lm):
    model, trained, attends = str(lm.with_policy("window:window=8")).splitlines()
    assert model.startswith("LM of 13,680 parameters")
    assert model.endswith(" in float32: 2 layers of width 16, 257 tokens")
    assert trained.startswith("  trained at 32 tokens, positions Rotary(base=100.0, dim=8")
    assert attends == "  policy window:window=8, on 1 device"


def test_bits_per_byte_of_uniform_bytes_is_eight():
    assert bits_per_byte(np.full(5, np.log(256)), 5) == pytest.approx(8)
    # Two tokens of 4 bytes at the price of 8 bytes each.
    assert bits_per_byte(np.full(2, 8 * np.log(2)), 8) == pytest.approx(2)
    with pytest.raises(InputError, match="stand for no text"):
        bits_per_byte(np.ones(1), 0)
