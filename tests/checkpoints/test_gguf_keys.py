"""Keys of GGUF files: each is used, means nothing at its value, or is refused by name."""

import numpy as np
import pytest

from lminf import checkpoints
from lminf.attention import rope
from lminf.checkpoints import gguf as reader
from lminf.checkpoints import gguf_tokenizer
from lminf.errors import InputError
from tests import cases
from tests.checkpoints import making
from tests.checkpoints.test_gguf import spec_with

# --- Keys that change the mathematics -------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "scaling"),
    [
        ({"rope__scale_linear": 8.0}, rope.Linear(8.0)),
        ({"rope__scaling__factor": 8.0}, rope.Linear(8.0)),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 8.0}, rope.Linear(2.0)),
        ({"rope__scaling__factor": 8.0, "rope__scaling__type": "none"}, rope.Unscaled()),
        ({"rope__scaling__factor": 0.0}, rope.Unscaled()),
        ({"rope__scale_linear": 1.0}, rope.Unscaled()),
        ({"rope__scaling__attn_factor": 1.0}, rope.Unscaled()),
    ],
)
def test_a_factor_without_a_type_scales_linearly_as_in_llama_cpp(facts, scaling, tmp_path):
    assert spec_with(tmp_path, **facts).encoding.scaling == scaling


def test_the_case_of_a_factor_under_its_old_name_is_scaled():
    spec = checkpoints.read_spec(cases.path("checkpoints/scale.gguf"))
    assert spec.encoding.scaling == rope.Linear(8.0)


def test_a_multiplier_of_yarns_temperature_is_used(tmp_path):
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    multiplier = float(np.float32(0.87824886))  # of R1-distilled Qwen3 8B: it undoes the other
    spec = spec_with(tmp_path, **yarn, rope__scaling__attn_factor=multiplier)
    assert spec.encoding.scaling.temperature == pytest.approx(1.0, abs=1e-7)


def test_keys_that_mean_nothing_at_their_value_are_passed_over(tmp_path):
    nothing = {
        "expert_count": 0, "expert_used_count": 0, "attention__causal": True, "logit_scale": 1.0,
        "pooling_type": 0, "rope__scaling__finetuned": True, "use_parallel_residual": False,
        "attention__sliding_window": 0, "attn_logit_softcapping": 0.0, "vocab_size": 320,
        "rope__scaling__yarn_log_multiplier": 0.0, "attention__max_alibi_bias": 0.0,
    }  # fmt: skip
    assert spec_with(tmp_path, **nothing) == making.BASE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention.causal", False),
        ("attention.clamp_kqv", 4.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.5),
        ("attention.sliding_window", 16),
        ("attn_logit_softcapping", 50.0),
        ("expert_used_count", 2),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("pooling_type", 1),
        ("residual_scale", 0.2),
        ("rope.dimension_sections", [2, 1, 1]),
        ("rope.freq_base_swa", 1e4),
        ("rope.scaling.attn_factor", 0.9),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("use_parallel_residual", True),
        ("a_key_of_tomorrow", 1),
    ],
)
def test_keys_of_other_mathematics_are_refused_by_name(name, value, tmp_path):
    path = making.write_gguf(tmp_path / "m.gguf", metadata={f"llama.{name}": value})
    with pytest.raises(InputError, match=f"llama.{name} = "):
        reader.load(path)


def test_blocks_of_an_older_layout_and_other_things_than_models_are_refused(tmp_path):
    for key, value in (("general.quantization_version", 1), ("general.type", "adapter")):
        path = making.write_gguf(tmp_path / "m.gguf", metadata={key: value})
        with pytest.raises(InputError, match=f"{key} = "):
            reader.load(path)


# --- Tokenizers -----------------------------------------------------------------------------------


def tokenizer_with(tmp_path, **metadata):
    named = {f"tokenizer.{name.replace('__', '.')}": value for name, value in metadata.items()}
    return checkpoints.load(making.write_gguf(tmp_path / "m.gguf", metadata=named)).tokenizer


def test_a_named_template_leaves_the_default_one_in_use(tmp_path):
    named = {"chat_template__tool_use": "no", "chat_templates": ["tool_use"]}
    assert tokenizer_with(tmp_path, **named).chat_template == making.CHAT
    assert tokenizer_with(tmp_path, **named, chat_template=None).chat_template is None


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-4o", "they'll|ĠGO|Ġ|123|45|Ġx|.y|ĊĊ|ĠÃ©|!"),
        ("dbrx", "they|'ll|ĠGO|Ġ|123|45|Ġx|.y|ĊĊ|ĠÃ©|!"),
        ("glm4", "they|'ll|ĠGO|Ġ|123|45|Ġx|.y|ĊĊ|ĠÃ©|!"),
        ("stablelm2", "they|'ll|ĠGO|Ġ|1|2|3|4|5|Ġx|.y|ĊĊ|ĠÃ©|!"),
        ("bloom", "they'll|ĠGO|Ġ12345|Ġx|.|y|ĊĊ|ĠÃ©|!"),
    ],
)
def test_ways_of_cutting_words_differ_in_contractions_digits_and_marks(pre, words):
    make, _ = gguf_tokenizer.WORDS[pre]
    cut = make().pre_tokenize_str("they'll GO 12345 x.y\n\n é!")
    assert "|".join(word for word, _ in cut) == words


def test_ids_that_no_token_has_are_ignored_as_llama_cpp_does(tmp_path):
    none = 2**32 - 1
    tokenizer = tokenizer_with(
        tmp_path, ggml__padding_token_id=none, ggml__eos_token_id=272, ggml__eot_token_id=270
    )
    assert tokenizer.end_ids == (270,)
    assert set(tokenizer.special) == {"bos_token"}
    plain = tokenizer_with(tmp_path, ggml__bos_token_id=none, ggml__add_bos_token=False)
    assert plain.bos_id is None
    with pytest.raises(InputError, match="puts the token 4294967295 before texts"):
        tokenizer_with(tmp_path, ggml__bos_token_id=none)


def test_joined_projections_have_a_key_head_for_every_query_head(tmp_path):
    metadata = {"gptneox.attention.head_count_kv": 2}
    path = making.write_gguf(tmp_path / "m.gguf", "gptneox", metadata=metadata)
    with pytest.raises(InputError, match="4 query and 2 key heads"):
        reader.load(path)
