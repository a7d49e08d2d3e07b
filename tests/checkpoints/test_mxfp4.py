"""GPT-OSS's weights in MXFP4."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lminf.checkpoints import hf, mxfp4
from lminf.errors import InputError
from tests.checkpoints import making
from tests.checkpoints.test_hf import GOLDENS


def test_values_are_those_of_the_format():
    """Every 4-bit value under an exponent of 2^1; low half of a byte first."""
    codes = np.arange(32, dtype=np.uint8) % 16
    blocks = (codes[::2] | codes[1::2] << 4).reshape(1, 1, 1, 16)
    found = mxfp4.dequantise(blocks, np.full((1, 1, 1), 128, np.uint8))
    positive = [0, 1, 2, 3, 4, 6, 8, 12]
    expected = [*positive, *(-x for x in positive)] * 2
    assert found.shape == (1, 32, 1)
    np.testing.assert_array_equal(found[0, :, 0], expected)


def packed(tmp_path, *, cut=False):
    """The golden, with the experts of 32 channels drawn as blocks; and what they should be."""
    config = json.loads((GOLDENS / "gpt_oss/config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 32}
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    spec_config = {k: v for k, v in config.items() if k != "quantization_config"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text(json.dumps(spec_config))
    spec = hf.read_spec(tmp_path / "plain")
    params = making.random_params(spec)
    hf.save(tmp_path / "model", spec, params, None)
    stored = safetensors.numpy.load_file(tmp_path / "model/model.safetensors")
    rng = np.random.default_rng(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = stored.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outer, inner // 32, 16), np.uint8)
        scales = rng.integers(120, 130, (experts, outer, inner // 32), np.uint8)
        stored[f"{name}_blocks"] = blocks
        stored[f"{name}_scales"] = scales[:, :, :0] if cut else scales
    safetensors.numpy.save_file(stored, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return stored


def test_experts_are_dequantised_when_they_are_read(tmp_path):
    stored = packed(tmp_path)
    _, params, _ = hf.load(tmp_path / "model")
    name = "model.layers.1.mlp.experts.{}_{}"
    down = mxfp4.dequantise(*(stored[name.format("down_proj", x)] for x in ("blocks", "scales")))
    up = mxfp4.dequantise(*(stored[name.format("gate_up_proj", x)] for x in ("blocks", "scales")))
    np.testing.assert_array_equal(params["layers"]["moe"]["down"][1], down)
    np.testing.assert_array_equal(params["layers"]["moe"]["gate"][1], up[..., ::2])
    np.testing.assert_array_equal(params["layers"]["moe"]["up"][1], up[..., 1::2])


def test_blocks_without_their_scales_are_refused(tmp_path):
    packed(tmp_path, cut=True)
    with pytest.raises(InputError, match="which are no blocks of MXFP4"):
        hf.load(tmp_path / "model")
