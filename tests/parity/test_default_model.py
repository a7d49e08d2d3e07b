"""The default model, read from its GGUF file by us and by transformers: tokens and losses."""

import pydoc_data.topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf import LM, checkpoints
from lminf.checkpoints import fetch
from lminf.evals import passkey
from lminf.evals.passkey import Passkey
from lminf.evals.task import Budget

pytestmark = pytest.mark.parity

MODEL = "smollm2-135m-instruct"
TEXTS = {
    "empty": "",
    "spaces": " a  b   c    d\t\te \n\n\n f\r\ng  ",
    "numbers": "1 12 123 1234567890 3.14159 -7e-12 1,000,000 ٣٤٥ ½ Ⅷ",
    "contractions": "I'm you're it's we'll they'd I'VE don't 'tis o'clock",
    "code": "def f(x):\n    return {'a': x**2, \"b\": [1,2,3]}  # no\n\tif x>=0: pass\n",
    "scripts": "naïve café — “quotes” Ελληνικά кириллица 漢字かな 한국어 עברית العربية ไทย",
    "combining": "e\u0301 a\u0308 \u200d\u200b\ufeff \u00a0\u2003 ﬁ ①",
    "emoji": "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ☃️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "control": "a\x00b\x01c\x7fd\x1b[0m",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|",
    "a long word": "x" * 1000,
    "marks": "!!! ... ??? --- *** ((())) [[]] {{}} $$$ %% ^^ && == <> \\\\ // ``",
}


@pytest.fixture(scope="session")
def model():
    return checkpoints.load(MODEL)


@pytest.fixture(scope="session")
def tokenizers(peer, model):
    """(ours, transformers')"""
    path = fetch.fetch(MODEL)
    theirs = peer.transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.tokenizer, theirs


def their_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


@pytest.mark.parametrize("name", TEXTS)
def test_odd_texts_split_equally(tokenizers, name):
    ours, theirs = tokenizers
    found = ours.encode(TEXTS[name], special="parse")
    assert found.tolist() == their_ids(theirs, TEXTS[name])
    assert ours.decode(found) == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_special_tokens_that_are_not_parsed_split_equally(tokenizers, name):
    ours, theirs = tokenizers
    ids = theirs(TEXTS[name], add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.encode(TEXTS[name]).tolist() == ids


def default_text():
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def test_the_default_text_splits_equally(tokenizers):
    ours, theirs = tokenizers
    text = default_text()
    np.testing.assert_array_equal(ours.encode(text), their_ids(theirs, text))


@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_any_text_splits_equally(tokenizers, text):
    ours, theirs = tokenizers
    assert ours.encode(text, special="parse").tolist() == their_ids(theirs, text)


def test_a_conversation_is_written_equally(tokenizers):
    ours, theirs = tokenizers
    messages = [
        {"role": "user", "content": "What is the pass key?"},
        {"role": "assistant", "content": "12345"},
        {"role": "user", "content": "  Twice that? \n"},
    ]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == expected
    assert ours.encode_chat(messages).tolist() == their_ids(theirs, expected)


def test_ends_of_text_are_transformers_own(tokenizers):
    ours, theirs = tokenizers
    assert theirs.eos_token_id in ours.eos_ids


def test_an_exported_tokenizer_splits_equally(peer, model, tmp_path):
    ours = model.tokenizer
    checkpoints.save(tmp_path / "exported", model)
    again = peer.transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in TEXTS.values():
        assert their_ids(again, text) == ours.encode(text, special="parse").tolist()
    assert (again.bos_token, again.eos_token) == (
        ours.special.get("bos_token"),
        ours.special.get("eos_token"),
    )


@pytest.mark.parametrize("length", [600, 1700, 3300, 8192])
def test_passkey_prompts_have_their_length_in_transformers_tokens(tokenizers, length):
    ours, theirs = tokenizers
    budget = Budget(length, ours.encode, "tokens")
    for sample in Passkey("landmark").instances(budget, count=4, key=(0,)):
        assert len(their_ids(theirs, sample.prompt)) == length == sample.tokens
    for sample in Passkey("lm_infinite").instances(budget, count=4, key=(0,)):
        copy = len(ours.encode(" " + passkey.FILLER))
        assert length - copy < len(their_ids(theirs, sample.prompt)) == sample.tokens <= length


def test_the_default_model_predicts_as_well(peer, model):
    torch = peer.torch
    path = fetch.fetch(MODEL)
    theirs = peer.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = model.tokenizer.encode(default_text())[:700]
    ids = torch.from_numpy(tokens).long()[None]
    with torch.no_grad():
        logits = theirs.eval()(input_ids=ids, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    found = LM(model.spec, model.params, model.tokenizer).token_nll(tokens)
    # Thirty layers of float32, and losses up to 20 nats.
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert found.mean() == pytest.approx(expected.mean(), abs=1e-5)
