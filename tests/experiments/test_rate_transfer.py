"""Rates taken over by other sizes: the base is the same model, shifts and costs are of its rate."""

import jax
import pytest

from lminf.errors import InputError
from lminf.experiments import rate_transfer
from lminf.run import request


@pytest.mark.slow
def test_the_base_is_the_same_in_both_parametrizations_and_a_second_call_measures_nothing(rows_of):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("rate_transfer", widths=())
    config = request.parse("rate_transfer", ["--config=rate_transfer:tiny"]).config
    of_size = len(config.rates) + config.coordinate_steps  # of one seed
    measured = [row["loss"] if row["part"] == "loss" else row["logits"] for row in rows]
    assert measured[:of_size] == measured[of_size:]
    assert [line["parametrization"] for line in rate_transfer.table(rows)] == [
        "standard", "completep",
    ]  # fmt: skip
    assert rows_of("rate_transfer", rows, widths=()) == []


def test_the_table_has_the_shift_of_the_best_rate_and_what_the_base_rate_costs():
    rows = [
        {"part": "loss", "parametrization": "standard", "width": width, "layers": 2, "seed": seed,
         "lr": 2.0**octave, "loss": 1 + 0.1 * (octave - best) ** 2}
        for width, best in ((32, -6), (64, -7)) for seed in (0, 1) for octave in (-8, -7, -6, -5)
    ]  # fmt: skip
    rows += [
        {"part": "coordinate", "parametrization": "standard", "width": width, "layers": 2,
         "seed": 0, "step": 1, "hidden": 0.5, "logits": 2.0} for width in (32, 64)
    ]  # fmt: skip
    base, wider = rate_transfer.table(rows)
    assert base["best rate"] == pytest.approx(2**-6)
    assert base["above it at the base's rate"] == 0
    assert wider["doublings from the base's"].startswith("-1.000 (")
    assert wider["above it at the base's rate"] == pytest.approx(0.1)
    assert (wider["hidden moved"], wider["logits moved"]) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (40,)}, "40 is no multiple of a head of 32"),
        ({"parametrizations": ("mup",)}, "there is no mup; choose from standard and completep"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(fields, message):
    config = request.parse("rate_transfer", ["--config=rate_transfer:tiny"]).config
    config.update(fields)
    with pytest.raises(InputError, match=message):
        rate_transfer.check(config)
