"""Policies as values: names, refusals, which layer gets which, how far they reach."""

import numpy as np
import pytest

from lminf.attention import policy as policies
from lminf.attention.policy import (
    NAMES,
    POLICIES,
    Full,
    Lambda,
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
from tests.attention import oracle


def test_names_are_those_of_the_command_line():
    assert LMInfinite(window=4096, sinks=10).name == "lm_infinite:window=4096,sinks=10"
    assert LMInfinite(8, 1, distance=7).name == "lm_infinite:window=8,sinks=1,distance=7"
    assert Full().name == "full"
    assert PerHead((Full(), Window(3))).name == "per_head(full;window:window=3)"
    assert PerLayer((Full(), Window(3))).name == "per_layer(full;window:window=3)"
    assert {NAMES[kind]: kind for kind in NAMES} == POLICIES


def test_policies_are_values():
    assert LMInfinite(4, 2) == LMInfinite(4, 2)
    assert len({LMInfinite(4, 2), LMInfinite(4, 2), LMInfinite(4, 3), Streaming(4, 2)}) == 3
    assert Lambda(4, 2) != LMInfinite(4, 2) != Streaming(4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "window=0: give at least 1"),
        (lambda: LMInfinite(4, -1), "sinks=-1: give at least 0"),
        (lambda: LMInfinite(4, 1, distance=-1), "distance=-1: give at least 0"),
        (lambda: LeakyReRoPE(4, 0), "stretch=0: give at least 1"),
        (lambda: SelfExtend(4, 0), "group=0: give at least 1"),
        (lambda: ReRoPE(4, log_from=1), "log_from=1: give at least 2"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- Layers ---------------------------------------------------------------------------------------

LOCAL_GLOBAL = (8, None, 8, None)


def test_full_is_every_layers_own_attention():
    own = (Window(8), Full(), Window(8), Full())
    assert policies.by_layer(Full(), windows=LOCAL_GLOBAL, num_kv_heads=2) == own


def test_a_policy_replaces_the_layers_that_read_everything():
    found = policies.by_layer(LMInfinite(4, 1), windows=LOCAL_GLOBAL, num_kv_heads=2)
    assert found == (Window(8), LMInfinite(4, 1), Window(8), LMInfinite(4, 1))
    assert policies.by_layer(ReRoPE(4), windows=(8, 8), num_kv_heads=2) == (ReRoPE(4),) * 2
    assert policies.by_layer(ReRoPE(4), windows=(None,) * 3, num_kv_heads=2) == (ReRoPE(4),) * 3


def test_a_pattern_repeats_over_the_layers():
    pattern = PerLayer((Window(4), Full()))
    found = policies.by_layer(pattern, windows=(None,) * 4, num_kv_heads=1)
    assert found == (Window(4), Full(), Window(4), Full())
    with pytest.raises(InputError, match="2 policies do not divide 3 layers"):
        policies.by_layer(pattern, windows=(None,) * 3, num_kv_heads=1)
    with pytest.raises(InputError, match="0 policies do not divide"):
        policies.by_layer(PerLayer(()), windows=(None,) * 3, num_kv_heads=1)


def test_head_policies_are_one_for_each_key_head():
    mix = PerHead((Full(), Window(4)))
    assert policies.by_layer(mix, windows=(None,), num_kv_heads=2) == (mix,)
    with pytest.raises(InputError, match="2 head policies but the model has 3 key/value heads"):
        policies.by_layer(mix, windows=(None,), num_kv_heads=3)


# --- Reach ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [Window(9), PerLayer((Full(), PerHead((Full(), LMInfinite(9, 1))))), SelfExtend(9, 2)],
)
def test_a_window_past_the_trained_length_is_refused(policy):
    policies.check_trained(policy, 9)
    with pytest.raises(InputError, match="window=9 but this model was trained at 8 tokens; use"):
        policies.check_trained(policy, 8)


@pytest.mark.parametrize("policy", [SelfExtend(6, 4), SelfExtend(8, 4), LeakyReRoPE(6, 4)])
def test_policies_that_compress_reach_just_the_trained_length(policy):
    trained = 16

    def farthest(tokens):
        return oracle.visible_and_distance(policy, np.array([tokens - 1]), np.array([0]))[1][0]

    end = policies.max_length(policy, trained)
    assert end == (trained - policy.window) * 4 + policy.window
    assert farthest(end) <= trained < farthest(end + 8)
    assert policies.max_length(PerHead((Full(), policy)), trained) == end


def test_other_policies_set_no_end():
    for policy in (Full(), Window(4), LMInfinite(4, 2), Streaming(4, 2), ReRoPE(4)):
        assert policies.max_length(policy, 16) is None
