"""Which tokens a model is trained on and read with, what each version changes, and its claims."""

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from lminf.errors import InputError
from lminf.experiments import _models
from lminf.experiments import long_context_training as experiment
from lminf.run import folder, request


def config(**fields):
    parsed = request.parse("long_context_training", ["--config=long_context_training:tiny"])
    assert parsed is not None
    parsed.config.update(fields)
    return parsed.config


@pytest.fixture
def study(random_lm, monkeypatch, tmp_path):
    monkeypatch.setattr(_models, "load", lambda *_, **__: random_lm)
    return experiment.Study(config(), folder.RunFolder(tmp_path))


def test_rows_are_parts_of_one_document_which_go_on_in_turn():
    texts = [np.arange(100, 109), np.arange(200, 206)]  # two rows of 4 and one
    rows = experiment.DocumentRows(texts, length=4, rows=2)
    first, second, third = (rows.batch(step) for step in range(3))
    assert first["tokens"].tolist() == [[100, 101, 102, 103], [200, 201, 202, 203]]
    assert first["targets"].tolist() == [[101, 102, 103, 104], [201, 202, 203, 204]]
    assert second["tokens"].tolist() == [[104, 105, 106, 107], [200, 201, 202, 203]]
    assert third["tokens"].tolist() == first["tokens"].tolist()


def test_what_is_read_was_not_trained_on_however_much_is_read(study, tmp_path):
    trained = {tokens.tobytes() for tokens in study.rows.texts}
    more = experiment.Study(config(documents=5), folder.RunFolder(tmp_path))
    assert {tokens.tobytes() for tokens in more.rows.texts} == trained
    assert len(more.held_out) == 5
    assert not trained & {tokens.tobytes() for tokens, _ in more.held_out}


def test_only_the_base_of_the_raised_version_differs(study, random_lm):
    raised = study.version("raised")
    assert raised.params is random_lm.params
    assert (random_lm.spec.encoding.base, raised.spec.encoding.base) == (10_000, 40_000)
    assert study.version("lm_infinite").spec == study.version("none").spec == random_lm.spec
    assert study.version("lm_infinite").policy.name == "lm_infinite:window=64,sinks=4"


@pytest.mark.slow
def test_adapters_change_matrices_and_full_training_all_parameters(study, random_lm):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        lora, finetuned = study.version("lora"), study.version("finetuned")
    assert lora.spec == finetuned.spec == study.raised.spec

    def changed(lm):
        return {
            jax.tree_util.keystr(path): bool((np.asarray(x) != np.asarray(y)).any())
            for (path, x), y in zip(
                jax.tree_util.tree_leaves_with_path(lm.params), jax.tree.leaves(random_lm.params),
                strict=True,
            )
        }  # fmt: skip

    assert all(changed(finetuned).values())
    assert {name for name, does in changed(lora).items() if does} == {
        name for name in changed(lora) if "'w" in name
    }


def row(version, document, nll, start=0):
    return {"version": version, "document": document, "nll": nll, "start": start,
            "stop": start + 64, "trained_length": 64, "processor_seconds": 1.0,
            "training_tokens": 0, "training_processor_seconds": 0.0}  # fmt: skip


def test_a_claim_is_a_difference_document_by_document():
    losses = {"none": (2.0, 5.0, 8.0), "lm_infinite": (2.1, 5.2, 8.3), "lora": (1.0, 4.0, 7.0)}
    rows = [row(version, document, nll, start) for version, values in losses.items()
            for document, nll in enumerate(values) for start in (0, 64)]  # fmt: skip
    none, above, *_ = experiment.table(rows)
    assert (none["version"], none["nats/token"], none["documents"]) == ("none", "loss", 3)
    assert above["nats/token"] == "above lm_infinite"
    lines = {(line["version"], line["nats/token"]): line for line in experiment.table(rows)}
    assert lines["lora", "above none"]["64–128"] == "-1.000 (-1.000 to -1.000)"
    assert lines["lora", "above lm_infinite"]["0–64"].startswith("-1.200 (-1.300 to -1.1")
    figures = experiment.plot(rows)
    assert set(figures) == {"long_context_training", "above_lm_infinite"}
    assert all(isinstance(figure, Figure) for figure in figures.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"versions": ("rised",)}, "no version is called 'rised'; did you mean 'raised'"),
        ({"rope_base": 0.5}, "rope_base"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        experiment.check(config(**fields))
