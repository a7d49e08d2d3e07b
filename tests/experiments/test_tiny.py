"""The tiny form of every experiment from its command line to its report, on a trained model."""

import importlib
import json
import os
import subprocess
import sys

import jax
import pytest

from lminf.experiments import _main, _models
from lminf.run import folder

pytestmark = pytest.mark.slow

NAMES = (
    "decode_cost", "diagnose_lengths", "effective_length", "kv_cache", "length_generalization",
    "impossible_languages", "knowledge_extraction", "long_context_eval", "long_context_loss",
    "long_context_retrieval", "long_icl", "long_output", "longpo", "passkey", "vocab_expansion",
    "windowed_training",
)  # fmt: skip
# With optax, which mixes dtypes.
TRAINING = ("impossible_languages", "knowledge_extraction", "windowed_training")


@pytest.fixture
def rows_of_tiny(tiny_lm, monkeypatch, tmp_path):
    monkeypatch.setattr(_models, "load", lambda *_, **__: tiny_lm)

    def measure(name):
        module = importlib.import_module(f"lminf.experiments.{name}")
        trains = name in TRAINING
        with (
            jax.numpy_dtype_promotion("standard" if trains else "strict"),
            jax.numpy_rank_promotion("allow" if trains else "raise"),
        ):
            _main.main(
                module.run, module.plot, table=module.table,
                argv=["--config=:tiny", f"--out={tmp_path / 'run'}"],
            )  # fmt: skip
        return folder.RunFolder(tmp_path / "run").rows()

    return measure


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_rows_figures_and_a_report(name, rows_of_tiny, tmp_path):
    assert rows_of_tiny(name)
    check_report(tmp_path / "run")


def check_report(out):
    report = (out / "report.md").read_text()
    figures = list((out / "plots").glob("*.png"))
    assert figures
    assert all(f"plots/{figure.name}" in report for figure in figures)


@pytest.fixture
def compiled_fast():
    """Much is compiled and little computed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("compiled_fast")
def test_recipes_of_data_for_long_contexts_are_measured_and_resumed(tmp_path):
    """It trains models of its own. What an interrupted call left of a recipe is measured again."""
    out, words = folder.RunFolder(tmp_path / "run"), ["--config=:tiny", f"--out={tmp_path / 'run'}"]
    module = importlib.import_module("lminf.experiments.long_context_data")
    whole = []
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax
            _main.main(module.run, module.plot, table=module.table, resumes=True, argv=words)
        rows = {json.dumps(row) for row in out.rows()}
        assert len(rows) == len(out.rows())
        check_report(out.path)
        whole.append(rows)
        out.keep(lambda row: row["recipe"] != "untie_the_knots" or row["part"] == "needle")
    assert whole[0] == whole[1]
    assert len({row["recipe"] for row in out.rows()}) == 6


def test_full_attention_breaks_past_its_training_length_and_lm_infinite_does_not(rows_of_tiny):
    """The text's own difficulty changes along it, so LM-Infinite is held against re-reading.

    Seen: Full 2.22 to 4.47 bits per byte; LM-Infinite 0.07 to 0.20 bits above re-reading.
    """
    bits, excess = {}, {}
    for row in rows_of_tiny("length_generalization"):
        bits.setdefault(row["policy"], []).append(row["bits_per_byte"])
        excess.setdefault(row["policy"], []).append(row["excess_over_reread"])
    assert bits["full"][-1] > bits["full"][0] + 1
    assert min(excess["full"][-4:]) > 1
    assert max(excess["lm_infinite:window=64,sinks=4"]) < 0.2


def test_the_command_trains_the_tiny_model_and_prints_a_table(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.length_generalization", "--config=:tiny",
         f"--out={tmp_path / 'run'}"],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=900,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "lm_infinite:window=64,sinks=4" in ran.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == "tiny"
