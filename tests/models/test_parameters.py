"""The parameter tree, its logical axes, and fresh parameters."""

import re

import jax
import numpy as np
import pytest

from lminf.attention import rope
from lminf.models import decoder
from tests.attention import cases
from tests.models import specs
from tests.models.specs import SPECS


def tree_of_the_docstring(s):
    """lminf/models/spec.py's table, as a function of the spec."""
    L, D, N, K, H, F, V = (
        s.num_layers, s.width, s.num_heads, s.num_kv_heads, s.head_dim, s.mlp.hidden_dim,
        s.vocab_size,
    )  # fmt: skip
    tree = {"embed": (V, D)}

    def norm(path, *shape):
        tree[f"{path}/scale"] = shape
        if s.norm.bias:
            tree[f"{path}/bias"] = shape

    if isinstance(s.encoding, rope.Learnt):
        tree["positions"] = (s.encoding.offset + s.encoding.length, D)
    if s.embed_norm:
        norm("embed_norm", D)
    if s.pre_norms:
        norm("layers/attention_norm", L, D)
    attention = {"wq": (L, D, N, H), "wk": (L, D, K, H), "wv": (L, D, K, H), "wo": (L, N, H, D)}
    if s.qkv_bias:
        attention |= {"bq": (L, N, H), "bk": (L, K, H), "bv": (L, K, H)}
    if s.out_bias:
        attention["bo"] = (L, D)
    if s.sinks:
        attention["sinks"] = (L, N)
    tree |= {f"layers/attention/{name}": shape for name, shape in attention.items()}
    if s.qk_norm == "head":
        tree["layers/attention/q_norm/scale"] = tree["layers/attention/k_norm/scale"] = (L, H)
    elif s.qk_norm is not None:
        tree["layers/attention/q_head_norms/scale"] = (L, N, H)
        tree["layers/attention/k_head_norms/scale"] = (L, K, H)
    if s.post_norms:
        norm("layers/attention_post_norm", L, D)
        norm("layers/mlp_post_norm", L, D)
    if s.pre_norms and s.residual != "parallel_shared":
        norm("layers/mlp_norm", L, D)
    mlp = {"w_up": (L, D, F), "w_down": (L, F, D)}
    if s.mlp.bias:
        mlp |= {"b_up": (L, F), "b_down": (L, D)}
    if s.mlp.gated:
        mlp["w_gate"] = (L, D, F)
        if s.mlp.bias:
            mlp["b_gate"] = (L, F)
    tree |= {f"layers/mlp/{name}": shape for name, shape in mlp.items()}
    norm("final_norm", D)
    if not s.tied:
        tree["head"] = (V, D)
    if s.head_bias:
        tree["head_bias"] = (V,)
    return tree


@pytest.mark.parametrize("family", SPECS)
def test_the_parameter_tree_is_that_of_the_docstring(family):
    assert specs.shapes(SPECS[family]) == tree_of_the_docstring(SPECS[family])


@pytest.mark.parametrize("family", SPECS)
def test_every_parameter_matches_one_rule_of_its_rank(family):
    spec = SPECS[family]
    sizes = {
        "vocab": spec.vocab_size, "embed": spec.width, "layers": spec.num_layers,
        "heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
        "mlp": spec.mlp.hidden_dim, "positions": 34,
    }  # fmt: skip
    for path, shape in specs.shapes(spec).items():
        rules = [axes for rule, axes in decoder.AXES.items() if re.fullmatch(rule, path)]
        assert len(rules) == 1, path
        assert tuple(sizes[axis] for axis in rules[0]) == shape, path


def test_every_rule_is_for_some_parameter():
    paths = [path for spec in (*SPECS.values(), specs.MIXED) for path in specs.shapes(spec)]
    for rule in decoder.AXES:
        assert any(re.fullmatch(rule, path) for path in paths), rule


def test_fresh_layers_differ_and_keep_the_size_of_activations():
    spec = specs.change(specs.GEMMA, width=64, head_dim=32, encoding=rope.Rotary(100.0, 8, "half"))
    params = cases.compiled(lambda key: decoder.init(spec, key=key))(jax.random.key(0))
    layers = params["layers"]
    for name, fan_in in (("wq", 64), ("wk", 64), ("wv", 64), ("wo", 4 * 32)):
        weights = np.asarray(layers["attention"][name])
        assert weights.std() == pytest.approx(fan_in**-0.5, rel=0.1)
        assert np.abs(weights[0] - weights[1]).max() > 0.1
    assert np.asarray(layers["mlp"]["w_down"]).std() == pytest.approx(24**-0.5, rel=0.1)
    # Gemma stores scales less one.
    assert not np.asarray(layers["attention_norm"]["scale"]).any()
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
