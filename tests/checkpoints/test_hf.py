import dataclasses
import errno
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import hf, hf_config, hf_tokenizer
from lminf.data.tokenizers import ByteTokenizer, Tokenizer
from lminf.errors import InputError
from tests.checkpoints import making

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


def write_golden(folder: Path, case: str, **changes) -> Path:
    """A copy of a golden's checkpoint, its config.json changed; `...` takes a field out."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDENS / case / "model.safetensors", folder)
    config = json.loads((GOLDENS / case / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", making.SPECS.values(), ids=making.SPECS)
def test_import_of_export_is_the_same_model(spec, tmp_path):
    params = making.random_params(spec)
    hf.save(tmp_path / "model", spec, params, making.tiny_tokenizer())
    again, params_again, tokenizer = hf.load(tmp_path / "model")
    assert again == spec
    making.assert_same(params, params_again)
    assert tokenizer.digest == making.tiny_tokenizer().digest


@pytest.mark.parametrize("case", CASES)
def test_export_of_import_is_the_file_that_transformers_wrote(case, tmp_path):
    spec, params, tokenizer = hf.load(GOLDENS / case)
    assert tokenizer is None
    hf.save(tmp_path / "model", spec, params, None)
    ours = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    theirs = safetensors.numpy.load_file(GOLDENS / case / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert hf.load(tmp_path / "model")[0] == spec


@pytest.mark.parametrize(
    "scaling",
    [
        rope.Linear(2.5),
        rope.DynamicNTK(2.0, 64),
        rope.Llama3(8.0, 1.0, 4.0, 16),
        rope.YaRN(4.0, 16),
        rope.YaRN(4.0, 16, 20.0, 2.0, 1.25, False),
        rope.LongRoPE((1.0, 1.5, 2.0, 2.5), (2.0, 3.0, 4.0, 5.0), 16, 4.0, 1.25),
    ],
)
def test_rotary_scalings_survive_the_round_trip(scaling):
    spec = dataclasses.replace(
        making.BASE, encoding=dataclasses.replace(making.BASE.encoding, scaling=scaling)
    )
    assert hf_config.to_spec(hf_config.from_spec(spec), "config.json") == spec


def test_a_tokenizer_and_what_surrounds_it_survive_the_round_trip(tmp_path):
    tokenizer = making.tiny_tokenizer()
    checkpoint = checkpoints.Checkpoint(
        making.BASE, making.random_params(making.BASE), tokenizer, "here"
    )
    checkpoints.save(tmp_path / "model", checkpoint)
    again = checkpoints.load(tmp_path / "model").tokenizer
    assert (again.special, again.add_bos, again.eos_ids, again.chat_template) == (
        tokenizer.special, True, tokenizer.eos_ids, making.CHAT
    )  # fmt: skip
    messages = [{"role": "user", "content": "the cat"}]
    assert again.chat(messages) == tokenizer.chat(messages) == "<|user|>the cat\n"


def test_a_byte_tokenizer_survives_the_round_trip(tmp_path):
    tokenizer = ByteTokenizer()
    hf.save(tmp_path / "model", making.BASE, making.random_params(making.BASE), tokenizer)
    again = checkpoints.load(tmp_path / "model").tokenizer
    assert again.encode("the é\n").tolist() == list("the é\n".encode())
    assert (again.digest, again.bos_id, again.eos_ids) == (tokenizer.digest, 256, (256,))


def test_parameters_load_in_the_asked_dtype(tmp_path):
    params = making.random_params(making.BASE)
    hf.save(tmp_path / "model", making.BASE, params, None)
    half = checkpoints.load(tmp_path / "model", dtype="bfloat16").params
    assert half["embed"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half["embed"], params["embed"].astype(ml_dtypes.bfloat16))
    hf.save(tmp_path / "half", making.BASE, half, None)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    making.assert_same(checkpoints.load(tmp_path / "half", dtype="bfloat16").params, half)


def shard(folder: Path) -> dict[str, list[str]]:
    """Splits the folder's safetensors into two shards with an index; names by shard."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts


def test_shards_are_one_model(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    shard(folder)
    making.assert_same(hf.load(folder)[1], hf.load(GOLDENS / "llama")[1])


# --- Configurations -------------------------------------------------------------------------------


def test_both_ways_to_say_a_rotary_encoding_mean_the_same():
    new = json.loads((GOLDENS / "llama_yarn" / "config.json").read_text())
    old = dict(new)
    said = dict(old.pop("rope_parameters"))
    old["rope_theta"] = said.pop("rope_theta")
    said["type"] = said.pop("rope_type")
    assert hf_config.to_spec(new, "new") == hf_config.to_spec(old | {"rope_scaling": said}, "old")


def test_fields_that_old_files_lack_mean_what_they_meant_then():
    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    for name in (
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
        "num_key_value_heads",
        "head_dim",
    ):
        del config[name]
    spec = hf_config.to_spec(config, "config.json")
    assert spec.encoding == rope.Rotary(10000.0, 8, "half")
    assert (spec.num_kv_heads, spec.qkv_bias, spec.mlp.bias) == (4, False, False)


def test_layer_types_and_max_window_layers_say_the_same():
    config = json.loads((GOLDENS / "qwen2_sliding" / "config.json").read_text())
    assert hf_config.to_spec(config, "x").windows == (None, 7, 7)
    del config["layer_types"]
    assert hf_config.to_spec(config, "x").windows == (None, 7, 7)
    config["use_sliding_window"] = False
    assert hf_config.to_spec(config, "x").windows == (None, None, None)


def test_deepseeks_pair_of_factors_is_a_temperature():
    config = json.loads((GOLDENS / "llama_yarn" / "config.json").read_text())
    config["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 0.5}
    temperature = hf_config.to_spec(config, "x").encoding.scaling.temperature
    assert temperature == pytest.approx((1 + 0.1 * np.log(4)) / (1 + 0.05 * np.log(4)))


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("llama", {"model_type": "rwkv"}, "type 'rwkv'"),
        ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5, which is not understood"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("llama", {"rms_norm_eps": ...}, "no rms_norm_eps"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("llama", {"hidden_size": "wide"}, "hidden_size = 'wide', which no model"),
        ("llama", {"num_attention_heads": 0, "head_dim": ...}, "num_attention_heads = 0, which"),
        ("llama", {"num_key_value_heads": 3}, "no multiple of num_kv_heads=3"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "no original_max_position"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "spin": 3}}, "rope_parameters.spin = 3"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("mistral", {"sliding_window": ...}, "no sliding_window"),
        ("qwen2_sliding", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"final_logit_softcapping": ...}, "no final_logit_softcapping"),
        ("gptj", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("mpt", {"no_bias": False}, "no_bias"),
        ("mpt", {"attn_config": {"alibi": False}}, r"attn_config\.alibi = False"),
        ("mpt", {"attn_config": {"qk_ln": True}}, r"attn_config\.qk_ln"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type"),
    ],
)
def test_what_a_configuration_asks_for_and_we_lack_is_refused_by_name(case, changes, says):
    config = json.loads((GOLDENS / case / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    with pytest.raises(InputError, match=says):
        hf_config.to_spec(config, "config.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"windows": (None, 16)}, "windows"),
        ({"residual": "parallel"}, "residual"),
        ({"encoding": rope.NoEncoding()}, "encoding"),
        ({"encoding": rope.Rotary(10000.0, 8, "half", rope.NTKAware(2.0))}, "encoding"),
        ({"family": "mine"}, "'mine'"),
    ],
)
def test_a_spec_that_the_format_cannot_say_is_not_exported(changes, says, tmp_path):
    spec = dataclasses.replace(making.BASE, **changes)
    with pytest.raises(InputError, match=says):
        hf.save(tmp_path / "model", spec, making.random_params(spec), None)
    assert not list(tmp_path.iterdir())


# --- Bad folders ----------------------------------------------------------------------------------


def edit_tensors(folder: Path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("llama", lambda t: t.update({"model.extra": t["model.norm.weight"]}), "holds model.extra"),
        ("llama", lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        ("llama", lambda t: t.pop("lm_head.weight"), "not tied .* set tie_word_embeddings to true"),
        (
            "llama_tied",
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "differs from the embedding .* set tie_word_embeddings to false",
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
            r"shape \(7,\) where its configuration asks for \(32,\)",
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            "has the type I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(case, change, says, tmp_path):
    folder = write_golden(tmp_path / "model", case)
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=says):
        checkpoints.load(folder)


def test_tensors_that_follow_from_the_configuration_are_passed_over(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_tensors(folder, lambda t: t.update(frequencies))
    making.assert_same(hf.load(folder)[1], hf.load(GOLDENS / "llama")[1])


def test_a_missing_shard_is_named(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks b\.safetensors \(1 of 2 shards"):
        checkpoints.load(folder)


def test_shards_without_their_index_are_refused(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors\.index\.json"):
        checkpoints.load(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    parts = shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(InputError, match=f"{min(parts['a.safetensors'])} twice"):
        checkpoints.load(folder)


def test_safetensors_cut_short_are_refused(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_in_folders_and_as_files(name, tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(InputError, match="no code is ever executed from a checkpoint"):
            checkpoints.load(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        checkpoints.load(tmp_path)
    folder = write_golden(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no safetensors"):
        checkpoints.load(folder)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    folder = write_golden(tmp_path / "model", "llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        checkpoints.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json holds a list"):
        checkpoints.load(folder)


def test_a_path_that_does_not_exist_is_not_looked_up_elsewhere():
    with pytest.raises(InputError, match=r"no file or folder \./nowhere"):
        checkpoints.load("./nowhere")
    with pytest.raises(InputError, match=r"no file or folder model\.gguf"):
        checkpoints.load("model.gguf")


# --- Tokenizers of folders ------------------------------------------------------------------------


def saved(tmp_path) -> Path:
    params = making.random_params(making.BASE)
    hf.save(tmp_path / "model", making.BASE, params, making.tiny_tokenizer())
    return tmp_path / "model"


def test_more_tokens_than_rows_are_refused_and_fewer_are_padding(tmp_path):
    small = dataclasses.replace(making.BASE, vocab_size=260)
    hf.save(tmp_path / "m", small, making.random_params(small), making.tiny_tokenizer())
    with pytest.raises(InputError, match="272 tokens but the embedding only 260 rows"):
        checkpoints.load(tmp_path / "m")
    assert checkpoints.load(saved(tmp_path)).tokenizer.vocab_size == 272 < making.BASE.vocab_size


def test_a_tokenizer_in_another_format_is_refused(tmp_path):
    folder = saved(tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer in tokenizer\.model but no tokenizer\.json"):
        checkpoints.load(folder)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    folder = saved(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json could not be read as a tokenizer"):
        checkpoints.load(folder)


def test_bos_follows_the_tokenizers_own_last_step_where_nothing_is_stated(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["add_bos_token"]
    config["bos_token"] = {"content": "<s>", "lstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = checkpoints.load(folder).tokenizer
    assert tokenizer.add_bos
    assert tokenizer.bos_id not in tokenizer.encode("the cat")
    making.tiny_tokenizer().backend.save(str(folder / "tokenizer.json"))  # has no such step
    assert not checkpoints.load(folder).tokenizer.add_bos


def test_unigram_with_byte_fallback_is_read_and_spelled(tmp_path):
    """SentencePiece's other model: what is no piece is bytes."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("cat", -4.0), ("c", -5.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    unspaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(unspaced)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    hf_tokenizer.write(tmp_path, Tokenizer(backend, special, True, (2,), None))
    again = checkpoints.read_tokenizer(tmp_path)
    text = "cat the é漢🙂 c"
    ids, ends = again.encode_with_bytes(text)
    assert again.decode(ids) == text
    assert ends[-1] == len(text.encode())
    assert (again.bos_id, again.eos_ids) == (1, (2,))


def test_the_template_file_and_a_list_of_templates_are_read(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "yes"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert checkpoints.load(folder).tokenizer.chat_template == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert checkpoints.load(folder).tokenizer.chat_template == "file"


# --- Saving ---------------------------------------------------------------------------------------


def test_an_address_is_refused_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs://bucket/model is no folder; a model is written into"):
        checkpoints.check_save("gs://bucket/model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        hf.save(tmp_path, making.BASE, making.random_params(making.BASE), None)
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", making.BASE, making.random_params(making.BASE), None)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "_write_safetensors", full)
    with pytest.raises(InputError, match=r"cannot write .*model: No space left"):
        hf.save(tmp_path / "model", making.BASE, making.random_params(making.BASE), None)
    assert not list(tmp_path.iterdir())
