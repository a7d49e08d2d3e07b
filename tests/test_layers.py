"""Imports point down: the table of docs/architecture.md, checked against every file's imports."""

import ast
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lminf import kernels

ROOT = Path(__file__).resolve().parent.parent
# Import name -> folder: those beside lminf/ in the repository are linked to from inside it.
PACKAGES = {
    "lminf": "lminf",
    "lminf.kernels": "kernels",
    "lminf.configs": "configs",
    "lminf.experiments": "experiments",
}

# Layer -> the layers it may import, itself aside. A module belongs to the longest name that fits.
BASE = {"lminf.errors", "lminf.types", "lminf.atomic", "lminf.config", "lminf.ranges"}
ATTENTION = BASE | {"lminf.kernels", "lminf.attention"}
MODELS = ATTENTION | {"lminf.models"}
DATA = BASE | {"lminf.data"}
TRAIN = MODELS | {"lminf.objectives", "lminf.surgery", "lminf.parallel", "lminf.train"}
CHECKPOINTS = TRAIN | DATA | {"lminf.checkpoints"}
LM = CHECKPOINTS | {"lminf.lm", "lminf.ngram"}
EVALS = LM | {"lminf.evals", "lminf.programs"}
LIBRARY = EVALS | {"lminf.ngram.model", "lminf.scaling", "lminf.run", "lminf"}
LAYERS = {
    "lminf.errors": set(),
    "lminf.types": set(),
    "lminf.atomic": {"lminf.errors"},
    "lminf.ranges": {"lminf.errors"},
    "lminf.config": {"lminf.errors", "lminf.ranges"},
    "lminf.kernels": set(),
    "lminf.attention": BASE | {"lminf.kernels"},
    "lminf.models": ATTENTION,
    "lminf.objectives": MODELS,
    "lminf.surgery": MODELS,
    "lminf.parallel": MODELS | {"lminf.objectives"},
    "lminf.scaling": BASE,
    "lminf.train": TRAIN,
    "lminf.data": BASE,
    "lminf.checkpoints": TRAIN | DATA,
    "lminf.ngram": DATA,
    "lminf.lm": CHECKPOINTS | {"lminf.ngram"},
    "lminf.ngram.model": LM,
    "lminf.programs": LM,
    "lminf.evals": LM,
    "lminf.run": BASE - {"lminf.types"},
    "lminf": LM,  # on first use of a name, so that importing the package stays instant
    "lminf.configs": DATA | TRAIN | {"lminf.run.sweep"},
    "lminf.experiments": LIBRARY | {"lminf.configs"},
    "lminf.commands": LIBRARY | {"lminf.configs", "lminf.experiments"},
    "lminf.cli": {
        "lminf",
        "lminf.atomic",
        "lminf.errors",
        "lminf.config",
        "lminf.run",
        "lminf.commands",
    },
}
FLAX = ("lminf.models", "lminf.surgery.lora")


def module_name(path: Path, package: str, folder: Path) -> str:
    parts = (package, *path.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path, package, ROOT / folder): path
    for package, folder in PACKAGES.items()
    for path in (ROOT / folder).glob("**/*.py")
    if not any(parent.is_symlink() for parent in path.parents)
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(name: str) -> set[str]:
    """Every module that a file's import statements name, inside functions too."""
    found = set()
    for node in ast.walk(parsed(FILES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: relative import; write it in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else str(node.module))
    return found


def within(name: str, layers) -> str | None:
    """The longest of the layers that the module belongs to."""
    fitting = [layer for layer in layers if name == layer or name.startswith(f"{layer}.")]
    # `lminf` means the package's own __init__, not all that is below it.
    fitting = [layer for layer in fitting if layer != "lminf" or name == "lminf"]
    return max(fitting, key=len, default=None)


def test_imports_point_down():
    faults = []
    for name in FILES:
        layer = within(name, LAYERS)
        assert layer, f"{name} is in no layer; add it to the table here and in docs/architecture.md"
        ours = [imported for imported in imports(name) if imported.split(".")[0] == "lminf"]
        allowed = LAYERS[layer] | {layer}
        faults += [
            f"{name} ({layer}) must not import {imported}"
            for imported in sorted(ours)
            if not within(imported, allowed)
        ]
    assert not faults, "\n".join(faults)


def test_only_models_import_flax():
    importers = [n for n in FILES if any(i.split(".")[0] == "flax" for i in imports(n))]
    assert importers
    faults = [name for name in importers if not within(name, FLAX)]
    assert not faults, f"{', '.join(faults)} import flax; only {', '.join(FLAX)} may"


def test_the_table_points_down():
    """Each layer may import only layers listed above it, so there is no way around in a circle."""
    listed = list(LAYERS)
    for layer, allowed in LAYERS.items():
        above = listed[: listed.index(layer)]
        assert all(within(other, above) for other in allowed - {layer}), layer


LONGEST = 450  # lines of a module that can be read in one sitting
# Modules above it: path -> why.
LONG: dict[str, str] = {}


def test_a_module_is_read_in_one_sitting():
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    faults = [name for name, count in lines.items() if count > LONGEST and name not in LONG]
    assert not faults, f"more than {LONGEST} lines: {', '.join(faults)}; divide them"


def test_long_modules_are_still_long():
    assert not [name for name in LONG if len(FILES[name].read_text().splitlines()) <= LONGEST]


def public(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods that others may call; what is defined inside one is its own."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_"):
                yield node
        elif isinstance(node, ast.ClassDef | ast.If):
            yield from public(node)


# Triton reads the annotations of its kernels' arguments, which are traced pointers and numbers.
TRACED = (".triton_kernels", ".triton_math")


def test_public_functions_are_annotated():
    faults = []
    for name, path in FILES.items():
        for function in [] if name.endswith(TRACED) else public(parsed(path)):
            every = function.args
            given = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
            bare = [a.arg for a in given if a and not a.annotation and a.arg not in ("self", "cls")]
            bare += [] if function.returns else ["what it returns"]
            faults += [f"{name}.{function.name}: annotate {', '.join(bare)}"] if bare else []
    assert not faults, "\n".join(faults)


def names_in(path: Path) -> set[str]:
    """Every name and attribute that a file's code uses."""
    nodes = list(ast.walk(parsed(path)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def test_every_kernel_operation_has_a_caller_in_the_library():
    """An operation is a function of `lminf.kernels` that has implementations to choose among."""
    offered = {
        name for name in kernels.__all__
        if inspect.isfunction(operation := getattr(kernels, name))
        and "implementation" in inspect.signature(operation).parameters
    }  # fmt: skip
    library = [
        path for name, path in FILES.items()
        if not name.startswith(("lminf.kernels", "lminf.experiments", "lminf.configs"))
    ]  # fmt: skip
    used = set().union(*(names_in(path) for path in library))
    assert offered
    assert offered <= used, f"no caller in lminf: {', '.join(sorted(offered - used))}"


@pytest.mark.slow
def test_importing_starts_no_device_and_makes_no_array():
    """With a platform that does not exist, the first array or device asked for is an error."""
    # Only Triton's compilers import what is written in Triton: a CPU has no triton. What stands in
    # lm-evaluation-harness needs the extra `harness`.
    apart = (".__main__", ".triton_kernels", ".triton_math", ".evals.harness")
    names = [name for name in FILES if not name.endswith(apart)]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_starts_without_jax():
    code = (
        "import sys\n"
        "from lminf import cli\n"
        "cli.main(['list'])\n"
        "slow = {'jax', 'numpy', 'matplotlib', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
