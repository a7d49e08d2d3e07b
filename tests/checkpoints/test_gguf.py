import gguf
import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import gguf as reader
from lminf.checkpoints import gguf_file
from lminf.checkpoints.families import FAMILIES
from lminf.errors import InputError
from tests.checkpoints import making


@pytest.mark.parametrize("architecture", making.GGUF_SPECS)
def test_every_architecture_comes_back_as_it_was_written(architecture, tmp_path):
    spec = making.GGUF_SPECS[architecture]
    params = making.random_params(spec)
    for value in (params["final_norm"]["scale"], *_scales(params["layers"])):
        value[...] = np.round(value * 64) / 64  # Gemma's norms are stored plus 1
    path = making.write_gguf(tmp_path / "m.gguf", architecture, params=params)
    again, params_again, tokenizer = reader.load(path)
    assert again == spec
    making.assert_same(params, params_again)
    assert tokenizer.add_bos
    assert tokenizer.vocab_size == 272


def _scales(layers):
    for name, value in layers.items():
        if isinstance(value, dict):
            yield from _scales(value)
        elif name == "scale":
            yield value


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_what_the_package_says_they_are(kind, tmp_path):
    quantisation = gguf.GGMLQuantizationType[kind]
    params = making.random_params(making.BASE)
    path = making.write_gguf(tmp_path / "m.gguf", params=params, kind=kind)
    again = reader.load(path)[1]
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(params["embed"], quantisation), quantisation
    )
    np.testing.assert_array_equal(again["embed"], expected)
    assert np.abs(again["embed"] - params["embed"]).max() < 0.5
    np.testing.assert_array_equal(again["final_norm"]["scale"], params["final_norm"]["scale"])


@pytest.mark.parametrize("kind", gguf_file.DEQUANTISED[8:])
def test_blocks_of_256_are_read(kind, tmp_path):
    """The package cannot write these, so the blocks are random bytes with sane scales."""
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    raw = np.random.default_rng(0).integers(0, 64, (3, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_file.open_gguf(tmp_path / "m.gguf")
    assert file.tensors["x"].shape == (3, 2 * block)
    expected = gguf.quants.dequantize(raw, quantisation)
    np.testing.assert_array_equal(file.read("x"), expected)


def test_our_header_is_the_packages_header(tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    ours, theirs = gguf_file.open_gguf(path), gguf.GGUFReader(path)
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (t.start, t.size_bytes) for name, t in ours.tensors.items()
    }
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == pytest.approx(value)


@pytest.mark.parametrize("name", making.GGUF_SPECS)
def test_tensors_are_called_what_the_package_calls_them(name):
    """The package maps names of Hugging Face to those of an architecture; so do our two tables."""
    architectures = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[name.partition("/")[0]], 2)
    ours = {row.places: row.name for row in making.gguf_rows(name)}
    spec, compared = making.GGUF_SPECS[name], 0
    for row in FAMILIES[spec.family].rows_of(spec):
        stored = row.name.replace(".norms.{n}", "").replace(".norms.{k}", "")
        if row.places not in ours or "{e}" in stored:
            continue
        theirs = names.get_name(stored.format(1), try_suffixes=(".weight", ".bias"))
        if theirs is not None:
            assert ours[row.places].format(1).removesuffix(".weight") == theirs.removesuffix(
                ".weight"
            )
            compared += 1
    assert compared > 8


def test_parts_of_a_model_are_read_from_the_first(tmp_path):
    params = making.random_params(making.BASE)
    making.write_gguf(tmp_path / "m.gguf", params=params, tensors_in_a_part=8)
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    spec, again, _ = reader.load(parts[0])
    assert spec == making.BASE
    making.assert_same(params, again)
    with pytest.raises(InputError, match=r"part 2 of 3; give the first one, m-00001-of-00003"):
        checkpoints.load(parts[1])
    parts[2].rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf is missing, one of 3 parts"):
        checkpoints.load(parts[0])
    (tmp_path / "other.gguf").rename(parts[2])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match="is no part of"):
        checkpoints.load(parts[0])


# --- Facts ----------------------------------------------------------------------------------------


def spec_with(tmp_path, *, changed=None, **facts):
    metadata = {f"llama.{name.replace('__', '.')}": value for name, value in facts.items()}
    path = making.write_gguf(tmp_path / "m.gguf", metadata=metadata, changed=changed)
    return reader.load(path)[0]


def test_a_head_narrower_than_width_over_heads_is_read(tmp_path):
    spec = spec_with(tmp_path, rope__scaling__type="none", attention__key_length=8, vocab_size=320)
    assert spec == making.BASE


def test_scalings_are_read(tmp_path):
    assert spec_with(
        tmp_path, rope__scaling__type="linear", rope__scaling__factor=2.5
    ).encoding.scaling == rope.Linear(2.5)
    assert spec_with(
        tmp_path,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=16,
    ).encoding.scaling == rope.YaRN(4.0, 16)


def test_llama_3_schedules_are_recognised_by_their_factors(tmp_path):
    schedule = rope.Llama3(32.0, 1.0, 4.0, 8192)
    plain = rope.Unscaled().frequencies(5e5, 8)
    factors = (plain / schedule.frequencies(5e5, 8)).astype(np.float32)
    spec = spec_with(tmp_path, changed={"rope_freqs.weight": factors}, rope__freq_base=5e5)
    assert spec.encoding.scaling == schedule
    with pytest.raises(InputError, match="those of no released Llama 3 model"):
        spec_with(tmp_path, changed={"rope_freqs.weight": factors * 1.1}, rope__freq_base=5e5)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"llama.expert_count": 8}, "no llama.expert_used_count"),
        ({"qwen2.expert_count": 8, "general.architecture": "qwen2"}, "no qwen2.embedding_length"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.attention.value_length": 4}, "values of 4"),
        ({"llama.attention.head_count_kv": 3}, "4 query and 3 key heads"),
        ({"llama.block_count": 10**9}, "block_count = 1000000000, which no model"),
        ({"llama.block_count": 999}, "tensors for 999 layers"),
        ({"llama.embedding_length": 0}, "embedding_length = 0, which no model"),
        ({"llama.context_length": "long"}, "context_length = 'long'"),
        ({"llama.rope.dimension_count": 7}, "rotates 7 of 8"),
        ({"tokenizer.ggml.merges": ["t he", "x"]}, "merges 'x', which its vocabulary"),
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"split.count": 2}, "one of 2 parts of a model but is not named so"),
        ({"tokenizer.ggml.pre": "falcon"}, "'falcon', which is not known; known are gpt-2"),
        ({"tokenizer.ggml.pre": None}, "no tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, 1 of them distinct"),
    ],
)
def test_what_a_file_says_and_we_do_not_know_is_refused_by_name(metadata, says, tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(InputError, match=says):
        reader.load(path)


def test_other_peoples_notes_are_passed_over(tmp_path):
    notes = {"general.name": "tiny", "quantize.imatrix.file": "x", "mine.note": 3}
    assert reader.load(making.write_gguf(tmp_path / "m.gguf", metadata=notes))[0] == making.BASE


def test_an_unknown_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'mamba'"):
        reader.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"blk.0.ffn_up.weight": None}, "lacks blk.0.ffn_up.weight"),
        ({"blk.0.extra.weight": np.ones(2, np.float32)}, "holds blk.0.extra.weight"),
        ({"token_embd.weight": None}, "no token_embd.weight"),
        ({"output_norm.weight": np.ones(5, np.float32)}, r"shape \(5,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors, says, tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", changed=tensors)
    with pytest.raises(InputError, match=says):
        checkpoints.load(path)


def test_a_head_of_its_own_or_the_embeddings(tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", changed={"output.weight": None})
    spec, params, _ = reader.load(path)
    assert spec.tied
    assert "head" not in params


# --- Damaged files --------------------------------------------------------------------------------


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4 not this")
    with pytest.raises(InputError, match="not a GGUF file"):
        checkpoints.load(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="not a GGUF file"):
        checkpoints.load(tmp_path / "m.gguf")


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = making.write_gguf(tmp_path / "m.gguf").read_bytes()
    for size in (4, 7, 20, 30, 200, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(InputError, match="cut short"):
            checkpoints.load(tmp_path / "cut.gguf")


def test_versions_and_types_from_the_future_are_refused(tmp_path):
    data = bytearray(making.write_gguf(tmp_path / "m.gguf").read_bytes())
    data[4] = 9
    (tmp_path / "new.gguf").write_bytes(data)
    with pytest.raises(InputError, match="version 9"):
        checkpoints.load(tmp_path / "new.gguf")
    with pytest.raises(InputError, match="tensor type 999"):
        gguf_file._record(tmp_path, "x", (32,), 999, 0)
