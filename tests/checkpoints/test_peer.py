"""What we write, transformers reads, and what both read is the same."""

import numpy as np
import pytest

from lminf import checkpoints
from lminf.checkpoints import fetch, gguf, hf, mxfp4, tensors
from lminf.checkpoints.families import FAMILIES
from tests.checkpoints import making

pytestmark = pytest.mark.parity

TEXTS = [
    "Hello world! I'm sure they'll say it's fine; WE'VE seen it.",
    "x = 3.14159 * 10**12  # 1,234,567\n\tif x>=0:\n\t\treturn\r\n",
    "  leading, trailing   and      runs \n\n\n of \t\t white space  ",
    "naïve café, cafe\u0301, Ωmega, Привет, 你好世界, नमस्ते, مرحبا, 한국어",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 e\u0301\u0323 \u200b\u00a0 \ufeff ½ ² Ⅷ ٣",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "don't DON'T 'tis '' `` — “quotes” … https://example.org/a?b=c&d=%20",
    "a" * 300 + "\n" + "0" * 40 + "\n" + "=" * 80,
    "",
]


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def assert_same_model(model, spec, params, folder) -> None:
    """What transformers saves of the model is, to us, this spec and these parameters."""
    model.save_pretrained(folder)
    again, params_again, _ = hf.load(folder)
    assert again == spec
    ours, theirs = tensors.flattened(params), tensors.flattened(params_again)
    for path, value in ours.items():
        np.testing.assert_allclose(theirs[path], value, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", making.SPECS)
def test_transformers_loads_what_we_export(name, transformers, tmp_path):
    spec = making.SPECS[name]
    params = making.random_params(spec)
    hf.save(tmp_path / "model", spec, params, making.tiny_tokenizer())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(model, spec, params, tmp_path / "again")


def test_transformers_tokenizes_and_chats_with_what_we_export(transformers, tmp_path):
    tokenizer = making.tiny_tokenizer()
    hf.save(tmp_path / "model", making.BASE, making.random_params(making.BASE), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text, special="parse").tolist()
    assert theirs("the").input_ids == [tokenizer.bos_id, *tokenizer.encode("the")]
    messages = [{"role": "user", "content": "the cat"}]
    said = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == tokenizer.chat(messages)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen2", "gemma2", "gemma3", "phi3", "stablelm", "bloom", "gpt2", "falcon"],
)
def test_transformers_reads_the_same_weights_from_gguf(architecture, transformers, tmp_path):
    # transformers takes as many rows as there are tokens.
    metadata = making.tokenizer_metadata(making.tiny_tokenizer())
    padding = [f"[PAD{i}]" for i in range(272, 320)]
    padded = {
        "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + padding,
        "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + [5] * len(padding),
        "tokenizer.ggml.padding_token_id": 0,
    }
    path = making.write_gguf(tmp_path / "m.gguf", architecture, metadata=padded)
    spec, params, _ = gguf.load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = model.state_dict()
    for item, make in tensors.write(spec, FAMILIES[spec.family].rows_of(spec), params):
        np.testing.assert_allclose(theirs[item.name], make(), atol=1e-6, err_msg=item.name)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_transformers_splits_text_the_same(pre, transformers, tmp_path):
    metadata = {"tokenizer.ggml.pre": pre}
    path = making.write_gguf(tmp_path / "m.gguf", metadata=metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = checkpoints.load(path).tokenizer
    normal = ours.backend.normalizer  # transformers' reading of such files leaves NFC out
    for text in TEXTS:
        if (
            "<|endoftext|>" in text
        ):  # transformers makes that a token whether the file has it or not
            continue
        text = normal.normalize_str(text) if normal else text
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text).tolist(), text


def test_transformers_dequantises_mxfp4_to_the_same_values(transformers):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = rng.integers(100, 140, (2, 6, 3), np.uint8)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(mxfp4.dequantise(blocks, scales), theirs.numpy())


def test_the_real_models_tokens_are_transformers_tokens(transformers):
    path = fetch.fetch("smollm2-135m-instruct")
    ours = checkpoints.load(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text, special="parse").tolist()
        assert ours.decode(ids) == theirs.decode(ids) == text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    said = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == said
