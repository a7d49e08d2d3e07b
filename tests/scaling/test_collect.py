"""Rows of sweeps as tables: what is written is what the fits read."""

import numpy as np
import pytest

from lminf import cli, scaling
from lminf.errors import InputError
from lminf.experiments import _collect as collect
from lminf.run import folder
from lminf.scaling import accounting, tables

FERTILITY = {512: 0.5, 1024: 0.4}
COMMON = {"corpus": "library", "text_digest": "ab", "seed": 0}


def step_rows(**changes):
    n = int(accounting.block_parameters(2, 64, 170))
    return [
        {**COMMON, "n": n, "width": 64, "hidden": 170, "heads": 4, "layers": 2, "seq_len": 64,
         "d": 131_072, "batch_sequences": batch, "batch_tokens": 64 * batch, "lr": lr,
         "train_loss": 4.1, "loss": 4.0 + lr, **changes}
        for batch in (2, 8) for lr in (1e-3, 2e-3)
    ]  # fmt: skip


def vocab_rows():
    return [
        {**COMMON, "budget_mode": "checkpoints", "vocab_size": v, "width": 64, "n_nv": 98_048,
         "tokens": tokens, "characters": tokens / FERTILITY[v],
         "tokens_per_character": FERTILITY[v], "lr": lr, "loss_u": -1.0 - lr,
         "flops": float(accounting.training_flops(98_048, 64 * v, tokens))}
        for v in (512, 1024) for tokens in (200_000, 400_000) for lr in (1e-3, 4e-3)
    ]  # fmt: skip


def test_a_step_table_is_read_back(tmp_path):
    path = tmp_path / "step.csv"
    path.write_text(collect.step([*step_rows(), *step_rows(seed=1)]))
    table = scaling.read_step(path, seq_len=2048)
    assert table.seq_len == 64
    np.testing.assert_allclose(table.loss, [4.001, 4.002, 4.001, 4.002] * 2)
    np.testing.assert_allclose(table.batch, [128, 128, 512, 512] * 2)


def test_a_mixture_of_experts_is_read_back_with_its_active_parameters(tmp_path):
    mixed = step_rows(experts=4, n_active=60_000, n=130_000)
    path = tmp_path / "step.csv"
    path.write_text(collect.step(mixed))
    table = scaling.read_step(path, seq_len=2048)
    assert set(table.n) == {130_000}
    assert set(table.n_active) == {60_000}
    columns, _ = tables.read_columns(path, dict.fromkeys(("nume", "M", "Na/N"), (0, np.inf, "")))
    np.testing.assert_allclose(columns["M"], table.flops_per_token)
    np.testing.assert_allclose(columns["Na/N"], 6 / 13)
    path.write_text(collect.step([*mixed, *step_rows()]))  # dense rows are the law's
    assert set(scaling.read_step(path, seq_len=2048).n) == {step_rows()[0]["n"]}


def test_a_vocabulary_table_has_the_best_rate_of_each_checkpoint(tmp_path):
    path = tmp_path / "vocab.csv"
    path.write_text(collect.vocab(vocab_rows()))
    measured = collect.fertility(vocab_rows())
    assert measured.to_json()["constants"] == [512.0, 0.5, 1024.0, 0.4]
    table = scaling.read_vocab(path, fertility=measured)
    assert len(table) == 4
    np.testing.assert_allclose(table.loss, -1.004)
    np.testing.assert_allclose(table.tokens, [200_000, 400_000] * 2)


def test_every_seed_of_the_best_rate_is_kept(tmp_path):
    """The rate is chosen by its mean: the least single loss is of the seed that was lucky."""
    lucky = [{**row, "seed": 1, "loss_u": -1.006 if row["lr"] < 2e-3 else row["loss_u"]}
             for row in vocab_rows()]  # fmt: skip
    unlucky = [{**row, "seed": 2, "loss_u": -0.9 if row["lr"] < 2e-3 else row["loss_u"] - 1e-3}
               for row in vocab_rows()]  # fmt: skip
    path = tmp_path / "vocab.csv"
    path.write_text(collect.vocab([*vocab_rows(), *lucky, *unlucky]))
    table = scaling.read_vocab(path, fertility=collect.fertility(vocab_rows()))
    np.testing.assert_allclose(table.loss, [-1.004, -1.004, -1.005] * 4)
    assert np.unique(table.run).size == 2  # seeds of one vocabulary are resampled together


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no finished cells"),
        (vocab_rows(), "no 'n', so it is of no learning rate x batch"),
        ([*step_rows(), *step_rows(corpus="prose")], "corpus library, prose.*--where"),
    ],
)
def test_rows_that_are_no_table(rows, message):
    with pytest.raises(InputError, match=message):
        collect.step(rows)


def test_the_command_chooses_rows(tmp_path, capsys):
    out = folder.RunFolder(tmp_path)
    for row in [*step_rows(), *step_rows(corpus="prose")]:
        out.append_row(row)
    cli.main(["scaling", "collect", "step", f"--runs={tmp_path}", "--where=corpus=prose",
              f"--out={tmp_path / 'new' / 'step.csv'}"])  # fmt: skip
    assert "4 rows" in capsys.readouterr().out
    assert "prose-seed0" in (tmp_path / "new" / "step.csv").read_text()
