"""Files that are damaged, hostile or of odd kinds: one sentence each, in little memory."""

import json
import os
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from lminf import checkpoints
from lminf.checkpoints import hf
from lminf.errors import InputError, refusing
from tests import cases
from tests.checkpoints import making

# Case -> what the sentence says, or None where the file is sound.
CASES = {
    "gguf-8.gguf": "'tokenizer.ggml.tokens' twice",
    "gguf-13.gguf": "eos_token_id = inf",
    "gguf-19.gguf": None,
    "gguf-28.gguf": "unknown kind 9",  # an array of arrays
    "gguf-32.gguf": "chat_template",
    "gguf-70.gguf": "merges = 0",
    "gguf-111.gguf": "chat_template = 7",
    "gguf-256.gguf": "tokenizer.ggml.pre",
    "hf_config-19": "eos_token_id = {}",
    "hf_config-248": "nested too deeply",
    "hf_eps_inf": "rms_norm_eps = inf",
    "hf_eps_text": "rms_norm_eps = 'x'",
    "hf_layers_2e28": "num_hidden_layers = 268435456",
    "hf_tok-9": "chat_template = 1",
    "hf_tok-45": "PanicException",
    "hf_tok-122": "nested too deeply",
    "pad.gguf": None,
    "scale.gguf": None,
    "tool.gguf": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sound checkpoint, to be copied."""
    path = tmp_path_factory.mktemp("sound") / "model"
    hf.save(path, making.BASE, making.random_params(making.BASE), making.tiny_tokenizer())
    return path


def copied(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_read_or_refused_with_its_sentence(name):
    path, says = cases.path(f"checkpoints/{name}"), CASES[name]
    if says is None:
        assert checkpoints.load(path).tokenizer is not None
        return
    with pytest.raises(InputError) as refused:
        checkpoints.load(path)
    assert says in str(refused.value)


# --- The boundary ---------------------------------------------------------------------------------


class PanicException(BaseException):  # as pyo3 has it
    pass


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), PanicException("in Rust")])
def test_whatever_a_library_raises_is_one_sentence(error):
    says = r"f\.bin could not be read as a thing \(.*fetch it again"
    with pytest.raises(InputError, match=says), refusing("f.bin", kind="thing"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), BrokenPipeError()])
def test_what_is_not_about_the_file_goes_through(error):
    with pytest.raises(type(error)), refusing("f.bin", kind="thing"):
        raise error


def test_control_characters_of_a_file_are_shown_escaped():
    error = InputError("a\x1b[31m\u202eb\ud800é\n  c\x00")
    assert str(error) == "a\\x1b[31m\\u202eb\\ud800é c\\x00"


def test_a_panic_of_rust_prints_no_backtrace(folder, tmp_path, capfd):
    model = copied(folder, tmp_path)
    parts = json.loads((model / "tokenizer.json").read_text())
    parts["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (model / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match=r"could not be read as a tokenizer \(PanicException"):
        checkpoints.read_tokenizer(model)
    assert capfd.readouterr().err == ""


def test_a_file_that_may_not_be_read_is_not_called_damaged():
    with pytest.raises(InputError, match="may be read"), refusing("f.bin", kind="thing"):
        raise PermissionError("no")


def test_a_pattern_that_takes_exponential_time_is_refused_when_it_is_read(folder, tmp_path):
    model = copied(folder, tmp_path)
    parts = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    split["invert"] = False
    steps = [split, parts["pre_tokenizer"]]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (model / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match="retry-limit"):
        checkpoints.read_tokenizer(model)


def test_a_pattern_that_fails_on_one_text_is_one_sentence(folder, tmp_path):
    model = copied(folder, tmp_path)
    parts = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(z+)+$"}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, parts["pre_tokenizer"]]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (model / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = checkpoints.read_tokenizer(model)
    with pytest.raises(InputError, match=r"the text could not be read .*retry-limit"):
        tokenizer.encode("z" * 64 + "b")


# --- JSON -----------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_dropped(folder, tmp_path):
    model = copied(folder, tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    assert checkpoints.load(model).spec == making.BASE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "llama", "model_type": "mistral"}', "'model_type' twice"),
        ('{"a": ' * 100_000, "nested too deeply|not JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not JSON"),
        ('{"model_type": {"a": 1}}', "model_type = {'a': 1}, which no model can have: give a text"),
        ('{"model_type": "llama", "tie_word_embeddings": "no"}', "give true or false"),
    ],
)
def test_odd_json_is_one_sentence(text, says, folder, tmp_path):
    model = copied(folder, tmp_path)
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=says):
        checkpoints.load(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_pipes_and_folders_are_refused_instead_of_read(name, folder, tmp_path):
    for make in (os.mkfifo, os.mkdir):
        model = copied(folder, tmp_path)
        (model / name).unlink()
        make(model / name)
        with pytest.raises(InputError, match="no plain file"):
            checkpoints.load(model)
        os.rename(model, tmp_path / make.__name__)


def test_a_json_file_of_a_gigabyte_is_not_read(folder, tmp_path):
    model = copied(folder, tmp_path)
    os.truncate(model / "tokenizer.json", 1 << 30)  # a hole, which takes no room
    with pytest.raises(InputError, match="has 1024 MiB"):
        checkpoints.load(model)


def test_more_layers_than_tensors_are_refused_before_anything_is_made_for_them(folder, tmp_path):
    model = copied(folder, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4096}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="tensors for 4096 layers"):
        checkpoints.load(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# --- Shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "/dev/zero", "sub/a.safetensors", "..", "a\\b.safetensors", 3, None],
)
def test_an_index_opens_nothing_outside_its_folder(shard, folder, tmp_path):
    model = copied(folder, tmp_path)
    (model / hf.WEIGHTS).rename(tmp_path / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / f"{hf.WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names the shard|does not say which file"):
        checkpoints.load(model)


def test_a_shard_that_is_a_pipe_is_refused(folder, tmp_path):
    model = copied(folder, tmp_path)
    (model / hf.WEIGHTS).unlink()
    os.mkfifo(model / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    (model / f"{hf.WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no plain file"):
        checkpoints.load(model)


def test_names_of_tensors_cannot_write_to_the_terminal(folder, tmp_path):
    model = copied(folder, tmp_path)
    tensors = safetensors.numpy.load_file(model / hf.WEIGHTS)
    tensors["\x1b[2Jmodel.extra"] = np.ones(2, np.float32)
    safetensors.numpy.save_file(tensors, model / hf.WEIGHTS)
    with pytest.raises(InputError, match=r"\\x1b\[2Jmodel\.extra"):
        checkpoints.load(model)


# --- Headers of GGUF ------------------------------------------------------------------------------


def test_counts_beyond_the_file_are_refused_without_making_room_for_them(tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    tokens = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    for place in (8, 16, tokens):  # tensors, pairs, texts of an array
        for count in (2**40, 2**63, 2**64 - 1):
            path.write_bytes(data[:place] + count.to_bytes(8, "little") + data[place + 8 :])
            with pytest.raises(InputError, match="cut short"):
                checkpoints.load(path)


@pytest.mark.parametrize("alignment", [0, 3, 2**31 + 1, -1.0, "32"])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment, tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", metadata={"general.alignment": alignment})
    with pytest.raises(InputError, match="which is no power of two"):
        checkpoints.load(path)


def test_tensors_that_lie_in_each_other_are_refused(tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path, "r+")
    reader.tensors[1].field.parts[-1][0] = reader.tensors[0].field.parts[-1][0]  # the offset
    reader.data.flush()
    with pytest.raises(InputError, match="where another tensor lies"):
        checkpoints.load(path)


def test_a_token_as_long_as_the_file_takes_no_quadratic_time(tmp_path):
    vocabulary = making.sentence_piece_metadata()
    vocabulary["tokenizer.ggml.tokens"][-1] = "a" * 300_000
    path = making.write_gguf(tmp_path / "m.gguf", metadata=vocabulary)
    checkpoints.read_tokenizer(path)
