"""Every config builds in every form, and every field of it is read by its experiment."""

import ast
import importlib

import pytest

from lminf.errors import InputError
from lminf.run import header, request, sweep
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
    unread = set(asked.config) - words(name)
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
    missing = {"Topic", "Question", "Command", "Time", "Expected", "Tiny"} - set(found.entries)
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


OWN = """from lminf.configs import passkey, step_sweep
def get_config(arg=""):
    c = passkey.get_config("tiny")
    {}
    return c
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.length = 5", "passkey reads no config.length; did you mean 'lengths'"),
        ("del c.depths", "config.depths is missing, which passkey reads"),
        ("raise SystemExit(3)", r"get_config\(''\) of .* fails with SystemExit: 3"),
        ("c.lengths = ()", r"config\.lengths=\(\): give at least one"),
    ],
)
def test_a_config_file_of_ones_own_has_the_fields_of_its_experiment(line, message, tmp_path):
    (tmp_path / "own.py").write_text(OWN.format(line))
    with pytest.raises(InputError, match=message):
        request.parse("passkey", [f"--config={tmp_path}/own.py"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("5", r"get_sweep\(config, ''\) of .* fails with TypeError"),
        ("1 / 0", "fails with ZeroDivisionError: division by zero"),
        ("(5,)", "gives 5 as a cell; give dictionaries"),
    ],
)
def test_a_sweep_of_ones_own_that_fails_is_one_sentence(cells, message, tmp_path):
    own = "def get_sweep(c, arg=''):\n    return {}\n"
    (tmp_path / "own.py").write_text(OWN.format("pass") + own.format(cells))
    asked = request.parse("passkey", [f"--config={tmp_path}/own.py"])
    with pytest.raises(InputError, match=message):
        sweep.cells_of(asked)
