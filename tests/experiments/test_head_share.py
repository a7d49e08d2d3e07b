"""What the vocabulary takes, against bytes counted by hand; the tiny form end to end."""

import jax
import jax.numpy as jnp
import pytest

from lminf.configs import head_share as config
from lminf.errors import InputError
from lminf.experiments import _main, head_share
from lminf.run import folder

DEVICES, WIDTH, VOCAB = 8, 3072, 262_144


def test_the_vocabulary_takes_its_bytes_on_every_device_or_its_slice():
    """bfloat16 weights, float32 gradients, master parameters and Adam's two moments: 18 bytes for
    each of the two tables; a micro-batch's own gradient 2 more. Over fsdp a device has its slice of
    the 18, and whole besides the gathered tables and their gradient before it is divided.
    """
    c = config.get_config("")
    program = head_share.program_of(c.planned.model, VOCAB, c.planned.length, dtype=jnp.bfloat16)
    rows = {name: head_share.planned(c, name, program) for name in head_share.STRATEGIES}
    tables = 2 * VOCAB * WIDTH
    expected_bytes = {
        "data": 18 + 2, "zero2": 2 + 16 / DEVICES + 2 + 2, "fsdp": 18 / DEVICES + 2 + 2 + 2,
        "tensor": (18 + 2) / DEVICES,
        "1f1b, last stage": (18 + 2) / 2, "1f1b, one barrier": (18 + 2) / DEVICES,
    }  # fmt: skip
    found = {name: row["vocab_bytes"] / tables for name, row in rows.items()}
    assert found == pytest.approx(expected_bytes)
    # Of the forward FLOPs and those of the backward; layers are computed once more (remat=full).
    layers = 2 * 32 * (4 * WIDTH**2 + 3 * WIDTH * 8192) + 32 * 2 * WIDTH * 4097
    head = 2 * WIDTH * VOCAB
    expected = 3 * head / (3 * head + 4 * layers)
    for name in ("data", "1f1b, one barrier"):
        assert rows[name]["vocab_time_share"] == pytest.approx(expected, rel=0.02)
    assert rows["1f1b, last stage"]["vocab_time_share"] > 2 * expected


def test_devices_that_divide_neither_rows_nor_layers_are_refused():
    c = config.get_config("")
    c.planned.devices = "a100x7"
    with pytest.raises(InputError, match="128 rows do not divide over 7 devices"):
        head_share.check(c)


@pytest.mark.slow
def test_the_tiny_form_leaves_rows_and_figures(tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        _main.main(
            head_share.run, head_share.plot, table=head_share.table, check=head_share.check,
            argv=["--config=:tiny", f"--out={tmp_path / 'run'}"],
        )  # fmt: skip
    rows = folder.RunFolder(tmp_path / "run").rows()
    compiled = [row for row in rows if row["part"] == "compiled"]
    assert len(rows) == 2 * 6 + 5
    assert {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")} == {
        "time", "memory", "compiled",
    }  # fmt: skip
    # Two devices. Weights, gradients and two moments of two tables of width 32, in float32, and a
    # piece's gradient; over fsdp the gathered tables and their whole gradient.
    table = 2 * 4 * 32
    expected = {"data": 5, "zero2": 1 + 3 / 2 + 2, "fsdp": 4 / 2 + 3, "tensor": 5 / 2,
                "1f1b, one barrier": 5 / 2}  # fmt: skip
    for row in compiled:
        model = expected[row["strategy"]] * table
        assert row["bytes_per_token_model"] == pytest.approx(model)
        assert model / 1.6 < row["bytes_per_token"] < 1.25 * model, row["strategy"]
