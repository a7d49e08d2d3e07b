"""Every number of a specification and of a rotary schedule has a range; none lies outside."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import rope
from lminf.checkpoints import hf_config
from lminf.errors import InputError
from lminf.models.spec import MLPSpec, ModelSpec, MoESpec, NormSpec
from tests import cases, stated_ranges
from tests.models import specs

SAMPLES = [
    specs.LLAMA,
    specs.LLAMA.norm,
    specs.LLAMA.mlp,
    specs.MIXED.moe,
    rope.Rotary(1e4, 8, "half"),
    rope.Alibi(8.0),
    rope.Linear(2.0),
    rope.NTKAware(2.0),
    rope.DynamicNTK(2.0, 64),
    rope.YaRN(4.0, 16),
    rope.Llama3(8.0, 1.0, 4.0, 8192),
    rope.LongRoPE((1.0, 2.0), (2.0, 4.0), 4096, 8.0),
    rope.Learnt(1024, 2),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_numbers_outside_their_range_are_refused_by_field(sample):
    kind = type(sample)
    assert stated_ranges.without_range(kind) == []
    tried = 0
    for field, value in stated_ranges.outside(kind):
        with pytest.raises(InputError, match=rf"^{kind.__name__}\.{field} is .*; give "):
            dataclasses.replace(sample, **{field: value})
        tried += 1
    assert tried > 3


def test_the_samples_are_all_kinds():
    assert {type(sample) for sample in SAMPLES} == {
        ModelSpec, NormSpec, MLPSpec, MoESpec, rope.Rotary, rope.Alibi, rope.Learnt,
        *(kind for kind in rope.SCALINGS.values() if kind is not rope.Unscaled),
    }  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: rope.YaRN(4.0, 16, beta_fast=1.0, beta_slow=2.0),
        lambda: rope.Llama3(8.0, 4.0, 4.0, 16),
        lambda: rope.Rotary(1e4, 7, "half"),
        lambda: rope.Rotary(1e4, 2, "half", rope.NTKAware(2.0)),
        lambda: specs.change(specs.LLAMA, encoding=rope.Rotary(1e4, 16, "half")),
        lambda: specs.change(specs.LLAMA, num_kv_heads=3),
        lambda: specs.change(specs.LLAMA, layer_encodings=(None,)),
        lambda: specs.change(specs.LLAMA, layer_encodings=(rope.Learnt(8, 0),) * 4),
        lambda: specs.change(specs.LLAMA, pre_norms=False),
        lambda: specs.change(specs.GPTJ, pre_norms=False, post_norms=True),
        lambda: rope.Rotary(1e4, 8, "half", rope.LongRoPE((1.0,) * 4, (1.0,) * 3, 64, 2.0)),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("scaling", [rope.Linear, rope.NTKAware, rope.YaRN])
def test_frequencies_are_finite_at_the_ends_of_every_range(scaling):
    for base in (math.nextafter(1, 2), 1e15):
        for factor in (1e-3, 1e6):
            lengths = (16,) if scaling is rope.YaRN else ()
            theta = scaling(factor, *lengths).frequencies(base, 8)
            assert np.isfinite(theta).all()
            rope._split(theta)


# --- Against the released schedules ---------------------------------------------------------------


def released() -> dict:
    return json.loads(cases.path("originals/15_rotary_schedules_and_alibi.json").read_text())


def test_frequencies_are_those_of_transformers():
    """Case 15: transformers 5.24, float32; to 1e-6 relative."""
    base = json.loads(BASE)
    tried = set()
    for name, case in released()["rope"].items():
        share = case["rope"].get("partial_rotary_factor", 1.0)
        config = base | {
            "max_position_embeddings": case["maxpos"],
            "head_dim": case["dim"],
            "rope_parameters": case["rope"],
        }
        if case["kind"] == "proportional":
            with pytest.raises(InputError, match="proportional"):
                hf_config.to_spec(config, "config.json")
            continue
        encoding = hf_config.to_spec(config, "config.json").encoding
        scaling = encoding.scaling
        assert encoding.dim == int(case["dim"] * share) == 2 * len(case["inv"])
        if isinstance(scaling, rope.DynamicNTK):
            theta = scaling.frequencies_at(encoding.base, encoding.dim, jnp.int32(case["seq"]))
        elif isinstance(scaling, rope.LongRoPE):
            theta = scaling.frequencies(encoding.base, encoding.dim, scaling.long_factor)
        else:
            theta = scaling.frequencies(encoding.base, encoding.dim)
        np.testing.assert_allclose(theta, case["inv"], rtol=1e-6, err_msg=name)
        assert scaling.temperature == pytest.approx(case["att"], rel=1e-6), name
        tried.add(name)
    assert len(tried) >= 14


def test_slopes_are_those_of_mpt():
    for heads, slopes in released()["alibi"].items():
        np.testing.assert_allclose(rope.Alibi(8.0).slopes(int(heads)), slopes["mpt"], rtol=1e-6)


BASE = """{"model_type": "llama", "vocab_size": 40, "hidden_size": 128, "num_hidden_layers": 1,
"num_attention_heads": 2, "intermediate_size": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu"}"""
