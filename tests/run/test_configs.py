"""Every config builds in every form, and every field of it is read by its experiment."""

import ast
import importlib

import pytest

from lminf.errors import InputError
from lminf.run import header, request
from tests.run import resolved

NAMES = [found.name for found in header.experiments()]
SOURCES = header.ROOT / "experiments"


def words(name: str) -> set[str]:
    """Attributes that the experiment's module, and those it shares with others, read."""
    paths = [SOURCES / f"{name}.py", *SOURCES.glob("_[!_]*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["", "tiny"])
def test_every_field_of_a_config_is_read(name, variant):
    asked = request.parse(name, [f"--config={name}:{variant}"])
    unread = {key for key in asked.config if key not in words(name)}
    assert not unread, f"configs/{name}.py sets {unread}, which experiments/{name}.py never reads"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(InputError, match="no variant 'tni'; did you mean 'tiny'"):
        request.parse(name, [f"--config={name}:tni"])


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_a_run_and_a_plot(name):
    module = importlib.import_module(f"lminf.experiments.{name}")
    assert callable(module.run)
    assert callable(module.plot)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_to_expect(name):
    found = header.read(header.CONFIGS / f"{name}.py")
    assert found.title
    missing = {"Question", "Command", "Time", "Expected", "Tiny"} - set(found.entries)
    assert not missing, f"the docstring of configs/{name}.py lacks {sorted(missing)}"


@pytest.mark.parametrize("name", NAMES)
def test_resolved_configs_match_the_stored_text(name):
    path = resolved.STORED / f"{name}.json"
    again = "python -m tests.run.resolved writes them anew, and its diff shows what changed"
    assert path.exists(), f"{path} is missing; {again}"
    assert resolved.text_of(name) == path.read_text(), f"configs/{name}.py differs; {again}"


def test_none_empties_a_field_that_may_be_empty(tmp_path):
    file = tmp_path / "emptied.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''):\n"
        "    held = {'class': 'Window', 'limit': 4}\n"
        "    return ConfigDict({'held': held, 'steps': 2, 'remat': 'dots', 'seed': None})\n"
    )

    def given(*words):
        asked = request.parse("emptied", [f"--config={file}", *words])
        assert asked is not None
        return asked

    assert given("--config.held.limit=none").resolved()["held"]["limit"] is None
    assert given("--config.held.limit=none").overrides == {"held.limit": None}
    assert given("--config.seed=none").config.seed is None
    assert given("--config.remat=none").config.remat == "none"
    with pytest.raises(InputError, match=r"steps=none: it is 2 and cannot be none"):
        given("--config.steps=none")
