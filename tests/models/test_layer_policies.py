"""Which policy each layer of a model has, what is refused, and how far a policy reads."""

import numpy as np
import pytest

from lminf.attention.policy import (
    Full,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    PerLayer,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.errors import InputError
from lminf.models import layer_policies
from tests.attention import oracle

LOCAL_GLOBAL = (8, None, 8, None)


def test_full_is_every_layers_own_attention():
    own = (Window(8), Full(), Window(8), Full())
    assert layer_policies.by_layer(Full(), windows=LOCAL_GLOBAL, num_kv_heads=2) == own


def test_a_policy_replaces_the_layers_that_read_everything():
    found = layer_policies.by_layer(LMInfinite(4, 1), windows=LOCAL_GLOBAL, num_kv_heads=2)
    assert found == (Window(8), LMInfinite(4, 1), Window(8), LMInfinite(4, 1))
    assert layer_policies.by_layer(ReRoPE(4), windows=(8, 8), num_kv_heads=2) == (ReRoPE(4),) * 2
    assert (
        layer_policies.by_layer(ReRoPE(4), windows=(None,) * 3, num_kv_heads=2) == (ReRoPE(4),) * 3
    )


def test_a_pattern_repeats_over_the_layers():
    pattern = PerLayer((Window(4), Full()))
    found = layer_policies.by_layer(pattern, windows=(None,) * 4, num_kv_heads=1)
    assert found == (Window(4), Full(), Window(4), Full())
    with pytest.raises(InputError, match="2 policies do not divide 3 layers"):
        layer_policies.by_layer(pattern, windows=(None,) * 3, num_kv_heads=1)
    with pytest.raises(InputError, match="0 policies do not divide"):
        layer_policies.by_layer(PerLayer(()), windows=(None,) * 3, num_kv_heads=1)


def test_head_policies_are_one_for_each_key_head():
    mix = PerHead((Full(), Window(4)))
    assert layer_policies.by_layer(mix, windows=(None,), num_kv_heads=2) == (mix,)
    with pytest.raises(InputError, match="2 head policies but the model has 3 key/value heads"):
        layer_policies.by_layer(mix, windows=(None,), num_kv_heads=3)


@pytest.mark.parametrize(
    "policy",
    [Window(9), PerLayer((Full(), PerHead((Full(), LMInfinite(9, 1))))), SelfExtend(9, 2)],
)
def test_a_window_past_the_trained_length_is_refused(policy):
    layer_policies.check_trained(policy, 9)
    with pytest.raises(InputError, match="window=9 but this model was trained at 8 tokens; use"):
        layer_policies.check_trained(policy, 8)


@pytest.mark.parametrize("policy", [SelfExtend(6, 4), SelfExtend(8, 4), LeakyReRoPE(6, 4)])
def test_policies_that_compress_reach_just_the_trained_length(policy):
    trained = 16

    def farthest(tokens):
        return oracle.visible_and_distance(policy, np.array([tokens - 1]), np.array([0]))[1][0]

    end = layer_policies.max_length(policy, trained)
    # Of SelfExtend the largest distance that was trained, as its release counts.
    past = trained - 1 if isinstance(policy, SelfExtend) else trained
    assert farthest(end) <= past < farthest(end + 8)
    assert layer_policies.max_length(PerHead((Full(), policy)), trained) == end


def test_the_text_that_self_extend_reaches_is_that_of_its_release():
    for window, trained, tokens in ((6, 16, 44), (8, 16, 40), (1024, 8192, 29_696)):
        assert layer_policies.max_length(SelfExtend(window, 4), trained) == tokens


def test_other_policies_set_no_end():
    for policy in (Full(), Window(4), LMInfinite(4, 2), Streaming(4, 2), ReRoPE(4)):
        assert layer_policies.max_length(policy, 16) is None
