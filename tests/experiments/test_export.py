"""An exported model attends as it was trained, wherever it is read."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lminf import checkpoints, cli
from lminf.attention.policy import FULL, POLICIES
from lminf.config import parse_choice
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.experiments import _training, train_lm
from lminf.lm.lm import LM
from lminf.run import folder, request
from tests.checkpoints import making

TEXT = "In a hole in the ground there lived a hobbit. " * 4


def model(policy):
    """A small model with random parameters that attends by the policy."""
    tokenizer = making.tiny_tokenizer()
    shape = dataclasses.replace(making.BASE, vocab_size=272)
    return LM(shape, making.random_params(shape), tokenizer, parse_choice(policy, POLICIES))


def exported(lm, path):
    checkpoints.save(path, train_lm.as_checkpoint(lm))
    return path


@pytest.mark.parametrize(
    ("policy", "window", "beside"),
    [
        ("full", None, False),
        ("window:window=8", 8, False),
        ("lm_infinite:window=8,sinks=2", None, True),
        ("streaming:window=8,sinks=2", None, True),
        ("infllm:window=8,sinks=2,topk=2,block=4,exec_block=4", None, True),
    ],
)
def test_an_exported_model_is_read_with_the_policy_it_was_trained_with(
    policy, window, beside, tmp_path
):
    lm = model(policy)
    path = exported(lm, tmp_path / "model")
    again = LM.from_pretrained(str(path))
    assert again.decoder.policies == lm.decoder.policies
    assert json.loads((path / "config.json").read_text()).get("sliding_window") == window
    assert (path / "lminf.json").exists() == beside


def test_a_policy_that_is_asked_for_wins(tmp_path):
    path = exported(model("lm_infinite:window=8,sinks=2"), tmp_path / "model")
    assert LM.from_pretrained(str(path), policy=FULL).policy == FULL
    assert LM.from_pretrained(str(path)).policy != FULL


@pytest.mark.slow
def test_commands_attend_as_trained_and_say_so(tmp_path, capsys):
    path = exported(model("lm_infinite:window=8,sinks=2"), tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    words = ["nll", str(path), f"--text={tmp_path / 'text'}", "--json"]
    cli.main(words)
    trained = capsys.readouterr()
    assert "attending as trained, by lm_infinite:window=8,sinks=2 (lminf.json)" in trained.err
    assert json.loads(trained.out)["policy"] == "lm_infinite:window=8,sinks=2"
    cli.main([*words, "--policy=full"])
    full = capsys.readouterr()
    assert "attending as trained" not in full.err
    assert json.loads(full.out)["bits_per_byte"] != json.loads(trained.out)["bits_per_byte"]
    cli.main(["convert", str(path), str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "lminf.json").read_text() == (path / "lminf.json").read_text()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"policy": 3}', '{"policy": null}', '{"policy": "lm_infinit"}', "\x00",
     '{"policy": "lm_infinite:window=-1,sinks=2"}', '{"policy": "full", "more": 1}'],
)  # fmt: skip
def test_a_damaged_policy_file_is_one_sentence(text, tmp_path):
    path = exported(model("lm_infinite:window=8,sinks=2"), tmp_path / "model")
    (path / "lminf.json").write_text(text)
    with pytest.raises(InputError, match=r"lminf\.json"):
        LM.from_pretrained(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lm_infinite:window=8,sinks=2", "window:window=8"])
def test_the_exported_model_has_the_loss_of_the_last_evaluation(policy, tmp_path):
    out = folder.RunFolder(tmp_path / "run")
    out.path.mkdir()
    words = ["--config=train_lm:tiny", "--config.model.width=32", "--config.model.num_layers=2",
             "--config.model.hidden_dim=48", "--config.data.batch=8", "--config.data.length=32",
             "--config.evaluate.batches=1", "--config.evaluate.sample=0", "--config.steps=20",
             "--config.evaluate.every=20", f"--config.attention={policy}",
             f"--config.export={tmp_path / 'model'}"]  # fmt: skip
    c = request.parse("train_lm", words).config
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = list(train_lm.run(c, out))
    lm = LM.from_pretrained(str(tmp_path / "model"))
    share = train_lm.batches.WHOLE
    batch = _training.data_of(c, ByteTokenizer(), share, vocab_size=257).held_out[0]
    rows_of = [np.append(row, batch["targets"][i, -1]) for i, row in enumerate(batch["tokens"])]
    nll = np.mean([lm.token_nll(ids.astype(np.int32)) for ids in rows_of])
    assert nll == pytest.approx(next(r["loss"] for r in rows if r["part"] == "loss"), abs=1e-4)
