"""Every fenced block of README, CONTRIBUTING and docs: programs and commands run, those that need a
cluster or hours resolve; links lead somewhere; the diagram is what the imports say.

    python     run, all blocks of a page one after another
    sh         each `lminf …` and `python -m …` is run
    console    each is parsed, and an experiment's configuration resolved
    text       not a command
"""

import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import device
from docs.tables import experiments, models, ngram, pipelines
from lminf import cli
from lminf.attention import policy as policies
from lminf.commands import _model, sweep
from lminf.data.tokenizers import ByteTokenizer
from lminf.kernels import suite
from lminf.lm.lm import LM
from lminf.run import request
from lminf.scaling import synthetic
from tests.attention import cases, oracle, test_identities
from tests.experiments.test_train_lm import TINY
from tests.models import specs
from tests.scaling import data
from tests.test_layers import FILES, LAYERS, ROOT, imports, within

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAINS = {"lminf.kernels.suite": suite, "benchmarks.device": device}
COMMAND = re.compile(r"(?:^|\s|/)(lminf|python -m|make) (.*)")
# Commands of other programs in a console block, which are not checked.
FOREIGN = ("gcloud", "git clone", "cd ", "pip install", "pre-commit", "sed ", "export ")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def lines(language: str) -> list[str]:
    """The commands of all pages, each once."""
    commands = [
        line
        for page in PAGES
        for block in blocks(page, language)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]
    return list(dict.fromkeys(commands))


def run(words, folder):
    # Where `make run` puts both commands.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    languages = {language for language, _ in FENCE.findall(page.read_text())}
    assert languages <= {"python", "sh", "console", "text"}
    for text in blocks(page, "text"):
        assert not re.search(r"^(lminf|python|make) ", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in lines("sh") if line != TINY])
def test_a_command_prints_its_result(command, tmp_path, monkeypatch):
    assert command.startswith(("lminf ", "python -m "))
    if "smollm2" in command:  # it computes more than it compiles
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    assert run(shlex.split(command), tmp_path).strip()


@pytest.mark.parametrize("command", lines("console"))
def test_a_command_that_is_too_long_to_run_resolves(command):
    if command.startswith(FOREIGN):
        assert shlex.split(command)
        return
    match = COMMAND.search(command)
    assert match, f"what should be checked of `{command}`?"
    check(match[1], shlex.split(match[2]))


def check(program, words):
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)
    elif program == "lminf" and words[0] == "run":
        assert request.parse(words[1], words[2:])
    elif program == "lminf" and words[0] == "sweep":
        flags = [word for word in words[2:] if not re.match("--(shard|submit|jobs|minutes)=", word)]
        # plan.py is written by another command of the page.
        flags = [word for word in flags if not word.startswith("--config=plan.py")]
        assert request.parse(sweep.experiment_of(words[1]), flags)
    elif program == "lminf":
        assert cli.parse(words)
    elif words[0] in MAINS:
        source = inspect.getsource(MAINS[words[0]].main)
        assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--"))
    elif words[0] != "pytest":
        assert request.parse(words[0].removeprefix("experiments."), words[1:])


# --- Programs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_programs_of_a_page_run(page, tmp_path):
    write_sweep(tmp_path / "exp_data.csv")
    run([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)


def write(path, columns):
    rows = zip(*(np.asarray(column, float).tolist() for column in columns.values()), strict=True)
    lines = [",".join(columns), *(",".join(map(repr, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def write_sweep(path, seed=0):
    """A vocabulary sweep in the published schema, for the page that reads one."""
    table = synthetic.vocab_sweep(noise=0.005, seed=seed)
    write(path, {
        "vocab_size": table.vocab_size, "embed_dim": table.width,
        "num_characters": table.characters, "Non_vocab_parameters": table.n_nv,
        "FLOPs": table.flops, "Lossu": table.loss,
    })  # fmt: skip


def write_grid(path, seed=0):
    """Grids of learning rate and batch in the published schema."""
    table = synthetic.step_grid(noise=0.001, seed=seed)
    one = np.ones_like(table.n)
    write(path, {
        "h": 1024 * one, "numl": 12 * one, "lr": table.lr, "bs": table.batch / table.seq_len,
        "ti": table.d / table.batch, "smooth loss": table.loss, "D": table.d, "N": table.n,
    })  # fmt: skip


def write_curves(path, table):
    score = {} if table.score is None else {"score": table.score}
    write(path, {"N": table.n, "D": table.d, "loss": table.loss, **score})


@pytest.mark.slow
def test_the_commands_that_read_measured_tables_run_on_drawn_ones(tmp_path):
    """In the order of the page."""
    for seed, name in enumerate(("exp_data.csv", "unseen_vocab.csv")):
        write_sweep(tmp_path / name, seed)
    for seed, name in enumerate(("dense_lr_bs_loss.csv", "unseen_step.csv")):
        write_grid(tmp_path / name, seed)
    write_curves(tmp_path / "runs.csv", data.synthetic_curves(0.01, 0))
    write_curves(tmp_path / "references.csv", data.synthetic_density(0.001, 0))
    block = next(b for b in blocks(ROOT / "docs/scaling_laws.md", "console") if "runs.csv" in b)
    reading = [line for line in block.splitlines() if re.match("lminf scaling ", line)]
    assert len(reading) == 6
    for command in reading:
        assert run(shlex.split(command), tmp_path).strip()


@pytest.fixture
def worked_example(monkeypatch):
    """What the blocks of docs/adding_a_policy.md define, where the tests of attention look."""
    defined: dict = {"__name__": "worked_example"}
    for block in blocks(ROOT / "docs/adding_a_policy.md", "python"):
        exec(compile(block, "adding_a_policy.md", "exec"), defined)
    for name, policy in defined["CASES"].items():
        monkeypatch.setitem(cases.POLICIES, name, policy)
    known = oracle.visible_and_distance

    def with_the_example(policy, i, j):
        own = isinstance(policy, defined["Pulled"])
        return (defined["visible_and_distance"] if own else known)(policy, i, j)

    monkeypatch.setattr(oracle, "visible_and_distance", with_the_example)
    return defined


ADDING = ROOT / "docs/adding_a_policy.md"
PULLED = "Pulled:window=5,sinks=3,pull=4"


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with the first file of docs/adding_a_policy.md, to work in."""
    (tmp_path / "my_policies.py").write_text(blocks(ADDING, "python")[0])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_policies", None)


def test_a_policy_in_a_file_of_ones_own_is_known_to_the_command_line(own_folder, monkeypatch):
    spec = specs.change(specs.shallow(specs.LLAMA, 2), vocab_size=257)
    lm = LM(spec, specs.parameters(spec), ByteTokenizer())
    monkeypatch.setattr(LM, "from_pretrained", lambda name, policy, **_: lm.with_policy(policy))
    args = cli.parse(["nll", "m", f"--policy=my_policies:{PULLED}"])
    assert _model.load(args).policy.name == f"my_policies:{PULLED}"
    mixed = lm.with_policy(f"per_layer:policies=(full,(my_policies:{PULLED}))")
    assert lm.with_policy(mixed.policy.name).policy == mixed.policy


@pytest.mark.slow
def test_a_policy_that_stays_is_known_by_its_name(own_folder):
    """The last step of the page, in a copy of the package."""
    source, step = blocks(ADDING, "python")[0], blocks(ADDING, "text")[0]
    register, line = '@policies.register("pulled")', "from lminf.attention import pulled as pulled"
    assert f"pulled.py      the file above, with {register} above @dataclass" in step
    assert f"__init__.py    one more line: {line}" in step
    shutil.copytree(ROOT / "lminf", own_folder / "lminf")
    home = own_folder / "lminf/attention"
    (home / "pulled.py").write_text(source.replace("@dataclass", f"{register}\n@dataclass"))
    with (home / "__init__.py").open("a") as file:
        file.write(f"{line}\n")
    program = (
        "import lminf, lminf.attention.parsing as p\n"
        "policy = p.parse_policy('pulled:window=5,sinks=3,pull=4')\n"
        "print(lminf.__file__, policy.name, p.parse_policy(policy.name) == policy)"
    )
    found, name, same = run([sys.executable, "-c", program], own_folder).split()
    assert Path(found).is_relative_to(own_folder)
    assert (name, same) == ("pulled:window=5,sinks=3,pull=4", "True")


@pytest.mark.parametrize(("encoding", "group"), [("rotary", 3), ("alibi", 1)])
def test_the_worked_policy_passes_the_tests_that_come_for_free(worked_example, encoding, group):
    forms = (test_identities.whole, cases.reference, test_identities.decoded)
    test_identities.check_formulas(list(worked_example["CASES"]), encoding, group, *forms)


def test_the_worked_policy_keeps_its_own_promise(worked_example):
    i, j = np.meshgrid(np.arange(30), np.arange(30), indexing="ij")
    same = oracle.visible_and_distance(policies.Lambda(5, 3), i, j)
    pulled = oracle.visible_and_distance(worked_example["Pulled"](5, 3, pull=1), i, j)
    for found, expected in zip(pulled, same, strict=True):
        np.testing.assert_array_equal(found[same[0]], expected[same[0]])


# --- Pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_that_are_there(page):
    text = page.read_text()
    defined = re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *defined]:
        assert not target.startswith("..") or page.parent == ROOT, f"{target} is not in the site"
        if not re.match(r"[a-z]+:", target):
            path = target.partition("#")[0]
            assert not path or (page.parent / path).exists(), target


def headings(page: Path) -> set[str]:
    """The anchors that the site gives the page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_into_a_page_lead_to_a_heading_of_it(page):
    for path, anchor in re.findall(r"\]\(([\w/]+\.md)?#([\w-]+)\)", page.read_text()):
        target = page.parent / path if path else page
        assert anchor in headings(target), f"{path}#{anchor}"


def test_the_index_of_experiments_is_what_configs_and_results_say():
    page = (ROOT / "docs/experiments.md").read_text()
    assert page == experiments.page(), "run: python docs/make_tables.py"


def test_the_table_of_models_is_what_the_tables_of_checkpoints_say():
    page = (ROOT / "docs/models.md").read_text()
    assert page == models.page(), "run: python docs/make_tables.py"


def test_the_tables_of_ngrams_are_those_of_the_rows():
    page = (ROOT / "docs/ngram.md").read_text()
    assert page == ngram.page(), "run: python docs/make_tables.py"


def test_the_table_of_pipelines_is_what_the_simulator_says():
    page = (ROOT / "docs/pipelines.md").read_text()
    assert page == pipelines.page(), "run: python docs/make_tables.py"


def test_every_page_is_in_the_site():
    listed = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_reference_is_of_names_that_exist():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, name


@pytest.mark.parametrize("name", policies.POLICIES)
def test_every_policy_has_its_mathematics(name):
    assert re.search(rf"`{name}[:`]", (ROOT / "docs/policies.md").read_text())


def test_every_source_named_in_the_code_is_cited():
    pattern = re.compile(r"arXiv:(\d{4}\.\d{5})")
    cited = set(pattern.findall((ROOT / "docs/citations.md").read_text()))
    for name, path in FILES.items():
        missing = set(pattern.findall(path.read_text())) - cited
        assert not missing, f"{name} names sources that docs/citations.md lacks"


# --- The diagram ----------------------------------------------------------------------------------


def drawn() -> list[tuple[int, set[str]]]:
    """Depth and layers of each line of the diagram."""
    levels = []
    for line in blocks(ROOT / "docs/architecture.md", "text")[0].splitlines():
        names = re.split(r" {2,}", line.strip())[0].replace(".py", "").split(", ")
        # A folder beside lminf/ is the subpackage that links to it.
        modules = [name.removeprefix("lminf/").replace("/", ".") for name in names]
        depth = (len(line) - len(line.lstrip())) // 3
        levels.append((depth, {f"lminf.{module}" for module in modules}))
    return levels


def imported(layer: str) -> set[str]:
    """The other layers that a layer's files import."""
    files = [name for name in FILES if within(name, LAYERS) == layer]
    names = {i for name in files for i in imports(name) if i.split(".")[0] == "lminf"}
    return {str(within(name, LAYERS)) for name in names} - {layer}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"\b(?:lminf|tests|kernels|experiments)/[\w/]+\.py\b", page.read_text()))
    templates = {name for name in named if "NAME" in name} | {"lminf/attention/pulled.py"}
    assert not [name for name in named - templates if not (ROOT / name).exists()]


def test_the_map_of_additions_names_files_that_exist():
    """NAME stands for that of the addition, so the folder above it is what must exist."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text[text.index("## Where does my thing go?") :].split("\n## ")[0]
    paths = [path for path in re.findall(r"`([\w/.]+)`", section) if "/" in path]
    assert len(paths) > 20
    for path in paths:
        before, name, _ = path.partition("NAME")
        assert ((ROOT / f"{before}NAME").parent if name else ROOT / path).exists(), path
    assert len(re.findall(r"^\| (?!to add)\w", section, re.MULTILINE)) == 12


def test_the_diagram_has_every_layer():
    layers = {within(name, LAYERS) for name in FILES} - {"lminf"}
    assert set().union(*(names for _, names in drawn())) == layers


@pytest.mark.slow
def test_what_a_line_of_the_diagram_imports_stands_above_it():
    above: set[str] = {"lminf"}
    for _, names in drawn():
        above |= names
        for name in names:
            assert imported(name) <= above, name


def test_a_line_of_the_diagram_is_under_what_it_imports():
    parents: list[set[str]] = []
    for depth, names in drawn():
        assert depth <= len(parents)
        parents = [*parents[:depth], names]
        if depth:
            assert parents[depth - 1] & set().union(*(imported(name) for name in names)), names
