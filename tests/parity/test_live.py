"""Our decoder beside transformers in one process: new weights, padding, caches, generation.

Run by `make parity`, which installs torch and transformers.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import LM, checkpoints
from lminf.attention import rope
from lminf.lm.generate import Sampling, generate_tokens
from lminf.models import heads

from .test_goldens import CASES, FIRST, LOGITS

pytestmark = pytest.mark.parity

# One of each family, and what differs in the cache or in the placing of tokens.
FAMILIES = [*FIRST, "llama_gqa", "llama_yarn", "qwen2_sliding", "mpt_clip", "falcon_alibi"]
# transformers caches rotated keys, and places all rows by the longest.
DECODED = [*FAMILIES, "phi3_longrope"]


@pytest.fixture(scope="session")
def both(peer, tmp_path_factory):
    """both(case, seed): transformers' model, and ours read from what it saved."""

    def make(case, seed):
        theirs = peer.build(case, seed)
        folder = tmp_path_factory.mktemp(case)
        theirs.save_pretrained(folder)
        loaded = checkpoints.load(str(folder))
        return theirs, LM(loaded.spec, jax.tree.map(jnp.asarray, loaded.params), loaded.tokenizer)

    return make


@partial(jax.jit, static_argnums=0)
def read(module, params, tokens, positions, caches):
    hidden, caches = module.apply({"params": params}, tokens, positions=positions, caches=caches)
    return heads.lm(module.spec, params, hidden), caches


def our_logits(lm, tokens, positions, caches=None):
    positions = jnp.asarray(positions, jnp.int32)
    logits, caches = read(lm.decoder, lm.params, jnp.asarray(tokens), positions, caches)
    return np.asarray(logits), caches


@pytest.mark.parametrize("case", CASES)
def test_new_weights_give_the_same_logits(peer, both, case):
    theirs, lm = both(case, seed=1)
    tokens = peer.draw_tokens(1, lm.spec.vocab_size)
    positions = np.tile(np.arange(peer.T), (2, 1))
    ours, _ = our_logits(lm, tokens, positions)
    assert abs(ours - peer.evaluate(theirs, tokens)["logits"]).max() <= LOGITS


def test_the_text_model_of_a_gemma_3_that_reads_images_gives_the_same_logits(peer, tmp_path):
    """Sparse as published: what its sections leave out is transformers' own."""
    import transformers

    text = {
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 7,
        "head_dim": 8,
        "vocab_size": 64,
        "sliding_window": 5,
        "num_attention_heads": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28,
              "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=images)
    peer.torch.manual_seed(1)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in set(written["text_config"]) - set(text) - {"model_type"}:
        del written["text_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = checkpoints.load(str(tmp_path))
    lm = LM(loaded.spec, jax.tree.map(jnp.asarray, loaded.params), loaded.tokenizer)
    tokens = peer.draw_tokens(1, lm.spec.vocab_size)
    ours, _ = our_logits(lm, tokens, np.tile(np.arange(peer.T), (2, 1)))
    with peer.torch.no_grad():
        expected = theirs(input_ids=peer.torch.from_numpy(tokens).long()).logits.numpy()
    assert abs(ours - expected).max() <= LOGITS


@pytest.mark.parametrize("case", FAMILIES)
def test_left_padding_changes_nothing_for_either(peer, both, case):
    torch = peer.torch
    theirs, lm = both(case, seed=3)
    tokens, padding = peer.draw_tokens(3, lm.spec.vocab_size), 5
    tokens[0, :padding] = 0
    real = np.ones_like(tokens)
    real[0, :padding] = 0
    positions = np.arange(peer.T) - np.array([[padding], [0]])
    placed = {"position_ids": torch.from_numpy(positions.clip(0))}
    if isinstance(lm.spec.encoding, rope.Alibi):
        placed = {}  # it takes no positions: its bias is relative
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(real).long(),
            use_cache=False,
            **placed,
        ).logits.numpy()
    ours, _ = our_logits(lm, tokens, positions)
    assert abs(ours - expected)[real == 1].max() <= LOGITS


# Not the dynamic case: transformers caches rotated keys, so while decoding its early keys keep the
# base of a shorter text, and its decoding does not equal its own prefill. Ours does.
@pytest.mark.parametrize("case", DECODED)
def test_decoding_through_the_caches_gives_the_same_logits(peer, both, case):
    torch = peer.torch
    theirs, lm = both(case, seed=4)
    tokens, prompt = peer.draw_tokens(4, lm.spec.vocab_size), 20
    caches, cached = lm.init_caches(batch=2, capacity=peer.T), None
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, peer.T))]:
        piece, positions = tokens[:, start:stop], np.tile(np.arange(start, stop), (2, 1))
        with torch.no_grad():
            out = theirs(input_ids=torch.from_numpy(piece).long(), cache=cached, use_cache=True)
        cached = out.cache
        ours, caches = our_logits(lm, piece, positions, caches)
        assert abs(ours - out.logits.numpy()).max() <= LOGITS, f"tokens {start} to {stop}"


@pytest.mark.parametrize("case", FIRST)
def test_decoding_under_a_policy_of_positions_is_reading_at_once(peer, both, case):
    """Of every family: the first tokens and a window, shorter than the text."""
    _, lm = both(case, seed=7)
    learnt = isinstance(lm.spec.encoding, rope.Learnt)
    lm = lm.with_policy("lambda:window=6,sinks=2" if learnt else "lm_infinite:window=6,sinks=2")
    tokens, prompt = peer.draw_tokens(7, lm.spec.vocab_size), 20
    expected, _ = our_logits(lm, tokens, np.tile(np.arange(peer.T), (2, 1)))
    caches = lm.init_caches(batch=2, capacity=peer.T)
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, peer.T))]:
        positions = np.tile(np.arange(start, stop), (2, 1))
        ours, caches = our_logits(lm, tokens[:, start:stop], positions, caches)
        assert abs(ours - expected[:, start:stop]).max() <= LOGITS, f"tokens {start} to {stop}"


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_generation_writes_the_same_tokens(peer, both, case):
    torch = peer.torch
    theirs, lm = both(case, seed=5)
    drawn, count = peer.draw_tokens(5, lm.spec.vocab_size), 12
    prompts = [drawn[0, :19], drawn[1, :11]]  # transformers is given them padded on the left
    padded, real = np.zeros((2, 19), np.int64), np.zeros((2, 19), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], real[row, -len(prompt) :] = prompt, 1
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        input_ids=torch.from_numpy(padded),
        attention_mask=torch.from_numpy(real),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )[:, 19:]
    written = generate_tokens(
        lm, prompts, sampling=Sampling(), max_new_tokens=count, key=jax.random.key(0)
    )
    assert np.stack(list(written), 1).tolist() == expected.tolist()


@pytest.mark.parametrize("case", CASES)
def test_what_we_export_transformers_reads_back_whole(peer, both, case, tmp_path):
    theirs, lm = both(case, seed=6)
    folder = tmp_path / "exported"
    checkpoints.save(folder, checkpoints.Checkpoint(lm.spec, lm.params, lm.tokenizer, "parity"))
    again, report = peer.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=theirs.config._attn_implementation, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    for name, weight in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], weight, err_msg=name)
    # Equal weights are not equal logits bit for bit: torch sums by how the memory is aligned.
    tokens = peer.draw_tokens(6, lm.spec.vocab_size)
    found, expected = peer.evaluate(again.eval(), tokens), peer.evaluate(theirs, tokens)
    assert abs(found["logits"] - expected["logits"]).max() <= LOGITS / 4
