"""config.json as the families publish it: older names of fields, defaults, what is refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lminf.attention import rope
from lminf.checkpoints import hf, hf_config
from lminf.errors import InputError
from tests.checkpoints import making
from tests.checkpoints.test_hf import GOLDENS

DROPPED = object()


def config_of(case: str, **changes) -> dict:
    """The golden's config.json with these fields changed, or dropped."""
    values = json.loads((GOLDENS / case / "config.json").read_text()) | changes
    return {name: value for name, value in values.items() if value is not DROPPED}


def spec_of(case: str, **changes):
    return hf_config.to_spec(config_of(case, **changes), "config.json")


# What transformers 4 called the rotary encodings that 5 writes by type of layer.
OLD_ROTARY = {"rope_parameters": DROPPED, "rope_theta": 500.0}


def test_gemma_3_of_transformers_4_says_the_same():
    spec = spec_of("gemma3")
    assert spec.encoding == rope.Rotary(500.0, 6, "half", rope.Linear(2.5))
    assert spec.layer_encodings == (rope.Rotary(50.0, 6, "half"), None)
    old = {"rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    assert spec_of("gemma3", **OLD_ROTARY, **old) == spec
    # Every layer is local but each sixth.
    pattern = {"layer_types": DROPPED, "sliding_window_pattern": 2, "_sliding_window_pattern": 2}
    assert spec_of("gemma3", **pattern).windows == spec.windows == (7, None)


def test_olmo_3_of_transformers_4_scales_only_the_layers_that_see_everything():
    spec = spec_of("olmo3")
    yarn = {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    old = spec_of("olmo3", **OLD_ROTARY, rope_scaling=yarn)
    assert old.encoding == spec.encoding
    assert old.layer_encodings == (rope.Rotary(500.0, 4, "half"), None)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_longrope_is_read_under_its_earlier_names(kind):
    spec = spec_of("phi3_longrope")
    assert spec.encoding.scaling == rope.LongRoPE(
        (1.0, 1.5, 2.0, 2.5), (1.5, 3.0, 5.0, 8.0), 12, 4.0
    )
    lists = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.5, 3, 5, 8], "type": kind}
    old = {"rope_scaling": lists, "original_max_position_embeddings": 12}
    assert spec_of("phi3_longrope", **OLD_ROTARY, **old) == spec


def test_a_phi_3_without_longrope_says_its_length_twice():
    assert spec_of("phi3", original_max_position_embeddings=64) == spec_of("phi3")


def test_a_mixture_is_read_with_the_names_of_both_versions():
    spec = spec_of("qwen3_moe")
    assert (spec.moe.experts, spec.moe.top_k, spec.moe.hidden_dim) == (4, 2, 12)
    assert spec_of("qwen3_moe", num_experts=4, num_local_experts=DROPPED) == spec
    normalised = spec_of("qwen3_moe", norm_topk_prob=True)
    assert normalised.moe.normalised
    assert not spec.moe.normalised


@pytest.mark.parametrize(
    ("layers", "head", "images"),
    [
        ("language_model.model.", "language_model.lm_head.", ""),  # of the published files
        ("model.language_model.", "lm_head.", "model."),  # as transformers 5 writes it
    ],
)
@pytest.mark.parametrize(("case", "whole"), [("ministral3", "mistral3"), ("gemma3", "gemma3")])
def test_the_text_model_of_one_that_reads_images_is_read_alone(
    case, whole, layers, head, images, tmp_path
):
    text = config_of(case)
    tied = text.pop("tie_word_embeddings")
    alone = safetensors.numpy.load_file(GOLDENS / case / "model.safetensors")
    prefixes = {"model": layers, "lm_head": head}
    stored = {
        prefixes[first] + rest: x
        for name, x in alone.items()
        for first, _, rest in [name.partition(".")]
    }
    for name in ("vision_tower.patch.weight", "multi_modal_projector.norm.weight"):
        stored[images + name] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": whole, "text_config": text, "vision_config": {"image_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    spec, params, _ = hf.load(tmp_path)
    alone, expected, _ = hf.load(GOLDENS / case)
    assert spec == alone
    making.assert_same(params, expected)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": whole}))
    with pytest.raises(InputError, match="no text_config"):
        hf.load(tmp_path)


def test_what_the_section_of_a_text_model_leaves_out_is_what_its_class_says():
    """The section as Gemma 3 of 4B has it, whose other values are those of Gemma3TextConfig."""
    section = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    spec = hf_config.to_spec({"model_type": "gemma3", "text_config": section}, "config.json")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    assert (spec.vocab_size, spec.tied, spec.query_scale) == (262_208, True, 1 / 16)
    assert spec.encoding == rope.Rotary(1e6, 256, scaling=rope.Linear(8.0))
    assert spec.layer_encodings[0] == rope.Rotary(1e4, 256)
    assert spec.windows[:7] == (1024,) * 5 + (None, 1024)


def test_falcons_of_all_three_shapes():
    assert (spec_of("falcon").num_kv_heads, spec_of("falcon").residual) == (2, "parallel")
    seven = spec_of("falcon_7b")
    assert (seven.num_kv_heads, seven.residual) == (1, "parallel_shared")
    alibi = spec_of("falcon_alibi")
    assert (alibi.encoding, alibi.residual) == (rope.Alibi(8.0, 0.5), "sequential")


def test_multipliers_that_are_absent_multiply_by_one():
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    spec = spec_of("granite", **dict.fromkeys((*names, "logits_scaling"), DROPPED))
    assert (spec.embed_scale, spec.residual_scale, spec.query_scale, spec.logit_scale) == (1,) * 4


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers = \[1\] for 2 layers"),
        ("smollm3", {"no_rope_layers": DROPPED}, "no no_rope_layers"),
        ("mixtral", {"rope_parameters": DROPPED}, "no rope_theta"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "no .*rope_theta"),
        ("phi3_longrope", {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0],
            "original_max_position_embeddings": 12}}, "lists of 1 factors for 4 pairs"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("mixtral", {"num_local_experts": 1}, "top_k=2 of 1 experts"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("cohere", {"logit_scale": DROPPED}, "no logit_scale"),
        ("cohere2", {"use_parallel_embedding": True}, "use_parallel_embedding"),
        ("gemma", {"head_dim": DROPPED}, "no head_dim"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
         "rope_parameters.llama_4_scaling_beta = 0.1, which is not understood"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1e4}}, "no .*llama_4_scaling_beta"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
    ],
)  # fmt: skip
def test_what_is_missing_or_not_supported_is_refused_by_name(case, changes, says):
    with pytest.raises(InputError, match=says):
        spec_of(case, **changes)


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gemma4_text", "did you mean 'gemma3_text'"),
        ("deepseek_v3", r"\(MLA\) stores one vector a token"),
        ("mamba2", "keep a state"),
        ("qwen2_vl", "reads images too"),
        ("olmo2_moe", r"docs/adding_a_model\.md shows how"),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest_family_or_the_reason(family, says):
    with pytest.raises(InputError, match=says):
        spec_of("llama", model_type=family)
