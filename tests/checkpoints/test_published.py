"""What published checkpoints have beside their weights: accepted where it changes nothing."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import hf, hf_config
from lminf.errors import InputError
from tests import cases
from tests.checkpoints import making
from tests.checkpoints.test_hf import GOLDENS, edit_tensors, saved, write_golden

# Fields of PretrainedConfig and GenerationConfig, of transformers 4.36 to 5.24, at other values
# than null; every one has been seen in a published config.json.
BOOKKEEPING = {
    "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True, "_name_or_path": "x/y",
    "add_cross_attention": False, "architectures": ["X"], "attn_implementation": "sdpa",
    "bad_words_ids": [[1]], "begin_suppress_tokens": [1], "bos_token_id": 1,
    "chunk_size_feed_forward": 0, "decoder_start_token_id": 1, "diversity_penalty": 0.0,
    "do_sample": True, "dtype": "bfloat16", "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "eos_token_id": [1, 2],
    "exponential_decay_length_penalty": [1, 1.1], "finetuning_task": "x", "forced_bos_token_id": 1,
    "forced_eos_token_id": 1, "id2label": {"0": "A"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"A": 0}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "neftune_noise_alpha": 5.0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": -1, "prefix": "x",
    "problem_type": "x", "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.1, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": 3, "suppress_tokens": [1], "task_specific_params": {"a": 1},
    "temperature": 0.6, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": "X", "top_k": 50, "top_p": 0.95, "torch_dtype": "float16",
    "torchscript": False, "transformers_version": "4.36.0", "typical_p": 1.0,
    "use_bfloat16": False, "use_cache": True, "use_mrope": False,
}  # fmt: skip


def spec_of(case: str, **changes):
    config = json.loads((GOLDENS / case / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    return hf_config.to_spec(config, "config.json")


@pytest.mark.parametrize("case", ["llama", "qwen2_sliding", "gemma2", "gpt_neox", "gptj", "mpt"])
def test_bookkeeping_changes_nothing(case):
    assert spec_of(case, **BOOKKEEPING) == spec_of(case)


@pytest.mark.parametrize(
    "field", [{"use_mrope": True}, {"pruned_heads": {"0": [1]}}, {"is_encoder_decoder": True}]
)
def test_the_same_fields_at_other_values_are_refused_by_name(field):
    with pytest.raises(InputError, match=f"{next(iter(field))} = .* not understood"):
        spec_of("llama", **field)


def test_the_published_configuration_of_qwen_2_5_loads():
    path = cases.path("originals/16_qwen25_base_config.json")
    spec = hf_config.to_spec(json.loads(path.read_text()), str(path))
    assert (spec.num_layers, spec.num_kv_heads, spec.tied) == (24, 2, True)
    assert spec.encoding == rope.Rotary(1e6, 64, "half")
    assert spec.windows == (None,) * 24


def test_quantised_weights_are_refused_with_both_ways_out():
    with pytest.raises(InputError, match="folder of the original weights, or a GGUF file"):
        spec_of("llama", quantization_config={"quant_method": "gptq", "bits": 4})


def test_a_multiplier_of_yarns_temperature_is_used():
    """R1-distilled Qwen3 8B: 0.8782488562869419 undoes the temperature (as vLLM reads it)."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for name in ("rope_scaling", "rope_parameters"):
        values = {"rope_parameters": ..., name: yarn | {"attn_factor": 0.8782488562869419}}
        assert spec_of("llama", **values).encoding.scaling.temperature == pytest.approx(1, abs=1e-7)
        values[name] = yarn | {"attn_factor": 1}
        usual = spec_of("llama", **values).encoding.scaling.temperature
        assert usual == pytest.approx(0.1 * math.log(4) + 1)
    stated = yarn | {"attn_factor": 0.9, "attention_factor": 1.0}
    with pytest.raises(InputError, match=r"attn_factor = 0\.9"):
        spec_of("llama", rope_parameters=stated)


# --- Tensors --------------------------------------------------------------------------------------


def test_a_tied_head_that_is_stored_again_is_the_embedding(tmp_path):
    folder = write_golden(tmp_path / "model", "llama_tied")
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": np.array(t["model.embed_tokens.weight"])})
    )
    making.assert_same(hf.load(folder)[1], hf.load(GOLDENS / "llama_tied")[1])


@pytest.mark.parametrize(
    "other",
    [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.safetensors.index.json",
        "a.safetensors",
    ],
)
def test_a_whole_file_of_weights_beside_others_is_read(other, tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    (folder / other).write_bytes(b"something else")
    making.assert_same(hf.load(folder)[1], hf.load(GOLDENS / "llama")[1])


def test_gpt_neox_is_read_as_transformers_4_36_and_later_saved_it(tmp_path):
    folder = write_golden(tmp_path / "model", "gpt_neox")
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    buffers = {
        "attention.bias": np.ones((1, 1, 8, 8), np.bool_),
        "attention.masked_bias": np.array(-1e9, np.float32),
        "attention.rotary_emb.inv_freq": np.ones(1, np.float32),
    }
    edit_tensors(
        folder,
        lambda t: t.update(
            {f"gpt_neox.layers.{i}.{n}": x for i in range(layers) for n, x in buffers.items()}
        ),
    )
    expected = hf.load(GOLDENS / "gpt_neox")
    rotary = expected[0].encoding
    share = rotary.dim / expected[0].head_dim
    old = {"rotary_pct": share, "rotary_emb_base": rotary.base}
    both = old | {"partial_rotary_factor": share, "rope_theta": rotary.base}
    new = {"rope_parameters": {"rope_theta": rotary.base, "partial_rotary_factor": share}}
    rest = {k: v for k, v in config.items() if "rot" not in k and not k.startswith("rope")}
    for names in (old, both, new, new | old):
        (folder / "config.json").write_text(json.dumps(rest | names))
        spec, params, _ = hf.load(folder)
        assert spec == expected[0]
        making.assert_same(params, expected[1])
    with pytest.raises(InputError, match=r"rope_theta = 77\.0 beside"):
        hf_config.to_spec(rest | both | {"rope_theta": 77.0}, "config.json")


# --- Tokenizers -----------------------------------------------------------------------------------


def with_padding(folder: Path, token: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))


def test_a_padding_token_beyond_the_embedding_is_left_out(tmp_path):
    rows = making.tiny_tokenizer().vocab_size
    spec = dataclasses.replace(making.BASE, vocab_size=rows)
    hf.save(tmp_path / "m", spec, making.random_params(spec), making.tiny_tokenizer())
    with_padding(tmp_path / "m", "[PAD]")
    with pytest.raises(InputError, match="273 tokens but the embedding only 272 rows"):
        checkpoints.load(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
    tokenizer = checkpoints.load(tmp_path / "m").tokenizer
    assert tokenizer.vocab_size == rows
    assert tokenizer.encode("the [PAD]").max() < rows


@pytest.mark.parametrize("ids", [-1, [271, -1], [271]])
def test_ids_that_mean_no_token_end_no_text(ids, tmp_path):
    folder = saved(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert checkpoints.load(folder).tokenizer.eos_ids == (271,)


def test_a_token_before_texts_that_the_vocabulary_lacks_is_refused(tmp_path):
    folder = saved(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<none>"}))
    with pytest.raises(InputError, match="no token '<none>', which is put before texts"):
        checkpoints.load(folder)


def test_an_id_of_four_thousand_millions_makes_no_table(tmp_path):
    folder = saved(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    vocab = {chr(0x100 + i): i for i in range(9)} | {"a": 2**32 - 2}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(InputError, match="a token of the id 4294967294"):
        checkpoints.read_tokenizer(folder)
