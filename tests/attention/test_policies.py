"""Policies as values: names, refusals, which layer gets which, how far they reach."""

import dataclasses
import sys

import pytest

from lminf import config
from lminf.attention.parsing import parse_policy
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
from lminf.config import from_config, to_config
from lminf.errors import InputError
from tests import stated_ranges

POLICIES_BY_CLASS = {kind.__name__: kind for kind in POLICIES.values()}


def test_names_are_those_of_the_command_line():
    assert LMInfinite(window=4096, sinks=10).name == "lm_infinite:window=4096,sinks=10"
    assert LMInfinite(8, 1, distance=7).name == "lm_infinite:window=8,sinks=1,distance=7"
    assert Full().name == "full"
    assert PerHead((Full(), Window(3))).name == "per_head:policies=(full,(window:window=3))"
    assert PerLayer((Full(), Window(3))).name == "per_layer:policies=(full,(window:window=3))"
    assert {NAMES[kind]: kind for kind in NAMES} == POLICIES


def test_policies_are_values():
    assert LMInfinite(4, 2) == LMInfinite(4, 2)
    assert len({LMInfinite(4, 2), LMInfinite(4, 2), LMInfinite(4, 3), Streaming(4, 2)}) == 3
    assert Lambda(4, 2) != LMInfinite(4, 2) != Streaming(4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "Window.window is 0; give a whole number of at least 1"),
        (lambda: ReRoPE(4, log_from=1), "ReRoPE.log_from is 1; give a whole number of at least 2"),
        (lambda: SelfExtend(2**20, 2**20), "is past the positions of 32 bits; give at most 1024"),
        (lambda: LeakyReRoPE(2**20, 2**20), "is past the positions of 32 bits; give at most 1024"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def example(name):
    """A small one; fields without a default are 64, and what must be smaller is."""
    small = {"sinks": 4, "turn": 8, "group": 2, "stretch": 2, "block": 8, "chunk": 8, "window": 32}
    if name in ("per_head", "per_layer"):
        return POLICIES[name]((Full(), Window(3), LMInfinite(4, 1)))
    if name == "infinite_hip":
        return POLICIES[name]()
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}
    needed = {"capacity": 64, "attended": 64} | small
    return POLICIES[name](**{key: value for key, value in needed.items() if key in fields})


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_its_text_and_its_section_of_a_config(name):
    policy = example(name)
    assert parse_policy(policy.name) == policy == parse_policy(policy)
    assert from_config(to_config(policy), POLICIES_BY_CLASS) == policy


@pytest.mark.parametrize("name", [n for n in POLICIES if not n.startswith("per_")])
def test_every_number_of_a_policy_has_a_range_and_nothing_outside_it_is_taken(name):
    policy = example(name)
    assert stated_ranges.without_range(POLICIES[name]) == []
    for field, value in stated_ranges.outside(POLICIES[name]):
        with pytest.raises(InputError, match=rf"^{type(policy).__name__}\.{field} is "):
            dataclasses.replace(policy, **{field: value})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("per_layer:policies=(full,(lm_infinite:window=5,sinks=3))",
         PerLayer((Full(), LMInfinite(5, 3)))),
        ("per_layer:policies=((per_head:policies=((window:window=4),full)),full)",
         PerLayer((PerHead((Window(4), Full())), Full()))),
    ],
)  # fmt: skip
def test_mixes_are_written_on_one_line(text, policy):
    assert parse_policy(text) == policy
    assert policy.name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("per_head:policies=(full,(per_layer:policies=(full)))", "no choice is called 'per_layer'"),
        ("per_layer:policies=(full,(window:window=0))", "Window.window is 0; give a whole number"),
        ("lm_infinit:window=4,sinks=1", "'lm_infinit'; did you mean 'lm_infinite'"),
        ("lm_infinit:Pulled", "'lm_infinit' and no module of that name.*did you mean 'lm_infini"),
        ("json:loads", "json has no policy 'loads'; give a class that derives from Policy"),
    ],
)
def test_a_text_that_is_no_policy_is_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        parse_policy(text)


def test_a_policy_in_a_file_of_ones_own_is_found_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "own_policies.py").write_text(
        "from dataclasses import dataclass\nfrom lminf.attention import policy as policies\n\n\n"
        "@dataclass(frozen=True)\nclass Narrow(policies.Window):\n    by: int = 1\n\n\n"
        "class Bare(policies.Window):\n    pass\n"
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    policy = parse_policy("own_policies:Narrow:window=5,by=2")
    assert policy.name == "own_policies:Narrow:window=5,by=2"
    assert isinstance(policy, Window)
    assert policy.window == 5
    mix = parse_policy(f"per_layer:policies=(full,({policy.name}))")
    assert mix == PerLayer((Full(), policy))
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero"):
        parse_policy("own_broken:Narrow")
    with pytest.raises(InputError, match=r"own_policies:Bare is no dataclass; put @dataclass"):
        parse_policy("own_policies:Bare:window=3")
    with pytest.raises(InputError, match="no policy is called 'own_policies'"):
        config.parse_choice(policy.name, POLICIES, what="policy")  # as fetched files are read


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class P(Policy):\n    window: int = 4", "own_{}:P has no num_sinks; give its"),
        ("class P(Policy):\n    sinks: int = 4", "own_{}:P has no window; give its class `win"),
        ("class P(Policy):\n    window: str = 'all'\n    num_sinks = 0",
         "window of the policy own_{}:P is 'all'; give a whole number"),
        ("class P(Policy):\n    window: int = 4\n    num_sinks: int",
         r"'own_{}:P' cannot be built \(AttributeError: .*mend its class"),
        ("class P(SparsePolicy):\n    window: int = 4\n    num_sinks = 0\n    group = 1",
         "cannot be built .TypeError: Can't instantiate .*'?select'?.; mend its class"),
        ("class P(Lambda):\n    window: int = 4\n    sinks: int = 1\n"
         "    def __post_init__(self):\n        1 / 0", "cannot be built .ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_class_of_ones_own_that_is_incomplete_is_one_sentence(
    body, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = f"own_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(
        "from dataclasses import dataclass\nfrom lminf.attention.policy import Lambda, Policy\n"
        "from lminf.attention.sparse import SparsePolicy\n\n\n"
        f"@dataclass(frozen=True)\n{body}\n"
    )
    with pytest.raises(InputError, match=message.format(module.removeprefix("own_"))):
        parse_policy(f"{module}:P")
