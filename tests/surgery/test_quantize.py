"""A whole model in int8: which parameters, how many bytes, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from lminf import checkpoints
from lminf.commands import plan
from lminf.errors import InputError
from lminf.models import cost, decoder, spec
from lminf.models.quantization import QuantizedWeights, is_quantized
from lminf.surgery.lora import LoRA
from lminf.surgery.quantize import quantize
from tests.models import specs
from tests.train import making


def test_matrices_are_int8_and_the_rest_is_not():
    params = quantize(specs.parameters(specs.MIXED))
    kinds = {
        jax.tree_util.keystr(path): type(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda x: isinstance(x, QuantizedWeights)
        )[0]
    }
    names = {path for path, kind in kinds.items() if kind is QuantizedWeights}
    matrices = ("embed']", "head']", "w_gate']", "w_up']", "w_down']", "gate']", "up']", "down']",
                "wq']", "wk']", "wv']", "wo']")  # fmt: skip
    assert names == {
        p for p in kinds if p.endswith(matrices) and "'b_" not in p and "bias" not in p
    }
    assert params["layers"]["moe"]["down"].scale.shape == (3, 4, 1, 16)
    assert params["layers"]["attention"]["wo"].scale.shape == (3, 1, 1, 16)
    assert params["embed"].scale.shape == (40, 1)


def test_memory_is_a_quarter_of_float32():
    shape = spec.llama(
        vocab_size=4096, width=512, num_layers=2, num_heads=8, num_kv_heads=2, hidden_dim=1024,
        trained_length=64,
    )  # fmt: skip
    whole = jax.eval_shape(lambda: decoder.init(shape, key=jax.random.key(0)))
    small = jax.eval_shape(quantize, whole)
    assert 0.25 < cost.weight_bytes(small) / cost.weight_bytes(whole) < 0.26
    assert cost.weight_bytes(whole) == 4 * cost.parameters(shape)
    planned = plan.weight_facts(shape, jnp.dtype("bfloat16"))
    assert planned["weights_bytes"] == 2 * cost.parameters(shape)
    # What is not a matrix is bfloat16: two norms in each layer, and the last.
    assert planned["int8_weights_bytes"] == cost.weight_bytes(small) - 2 * 5 * 512


def test_int8_weights_are_refused_where_they_mean_nothing(tmp_path):
    params = quantize(making.params())
    program = making.program()
    checkpoint = checkpoints.Checkpoint(program.spec, params, None, "")
    for refused, said in [
        (lambda: quantize(params), "these weights are int8 already"),
        (lambda: LoRA(2).init(params, key=jax.random.key(0)), "LoRA needs floating-point weights"),
        (lambda: LoRA(2).merge(params, {"layers": {}}), "LoRA needs floating-point weights"),
        (lambda: program.start(params), "training needs floating-point weights"),
        (lambda: checkpoints.save(tmp_path / "out", checkpoint), "export needs floating-point"),
        (lambda: checkpoints.check_save(tmp_path / "out", checkpoint), "export needs floating"),
    ]:
        with pytest.raises(InputError, match=said):
            refused()
    assert not is_quantized(making.params())
    assert not (tmp_path / "out").exists()


def test_dtype_of_the_scales_does_not_follow_the_weights():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), making.params())
    quantized = quantize(half)["layers"]["mlp"]["w_up"]
    assert quantized.scale.dtype == jnp.float32
    assert quantized.qvalue.dtype == jnp.int8
