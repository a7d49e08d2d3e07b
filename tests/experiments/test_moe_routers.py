"""The comparison of routers, in its tiny form."""

import dataclasses

import jax
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import moe_routers
from lminf.models import cost
from lminf.models.routers import ExpertChoice, TokenChoice
from lminf.run import request


def config():
    parsed = request.parse("moe_routers", ["--config=moe_routers:tiny"])
    assert parsed is not None
    return parsed.config


def test_models_have_as_many_active_parameters():
    c = config()
    active = {
        name: cost.block_parameters(moe_routers.shape_of(c, name), active=True) for name in c.models
    }
    assert len(set(active.values())) == 1
    assert len(active) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("hash",)}, "what the others are compared with is missing; add token_choice"),
        ({"models": ("token_choice", "hsh")}, "no model is called 'hsh'; did you mean 'hash'"),
        ({"top_k": 3}, "3 experts do not divide 32 active channels"),
        ({"contexts": 2}, "rows are read 4 at a time, as in training"),
        ({"pieces": 3}, "3 pieces do not divide an expert of 16 channels"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(fields, message):
    c = config()
    c.update(fields)
    with pytest.raises(InputError, match=message):
        moe_routers.check(c)


def test_where_experts_choose_the_causal_reading_lets_tokens_choose():
    """By the same weights: nothing else that a text's later tokens could change is left."""
    readings = moe_routers.readings(moe_routers.shape_of(config(), "expert_choice"))
    trained, causal = (readings[name].moe for name in ("as trained", "causal"))
    assert trained.router == ExpertChoice()
    assert causal == dataclasses.replace(trained, router=TokenChoice())
    readings = moe_routers.readings(moe_routers.shape_of(config(), "hash"))
    assert readings["as trained"].moe.capacity_factor == 1.25
    assert readings["causal"].moe.capacity_factor is None


@pytest.mark.slow
def test_it_measures_every_model_of_every_seed_and_goes_on(rows_of):
    models = {"models": ("token_choice", "upcycled")}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes
        rows = rows_of("moe_routers", **models)
    assert len(rows) == 2 * 2 * 2
    losses = {(row["model"], row["reading"], row["seed"]): row["loss"] for row in rows}
    lines = {(line["model"], line["read"]): line for line in moe_routers.table(rows)}
    for reading in ("as trained", "causal"):
        paired = [losses["upcycled", reading, seed] - losses["token_choice", reading, seed]
                  for seed in (0, 1)]  # fmt: skip
        line = lines["upcycled", reading]
        assert line["above token choice"].startswith(f"{np.mean(paired):.3f} (")
    dropped = {reading: [row["dropped"] for row in rows if row["reading"] == reading]
               for reading in ("as trained", "causal")}  # fmt: skip
    assert max(dropped["as trained"]) > 0
    assert max(dropped["causal"]) == 0
    assert rows_of("moe_routers", rows, **models) == []
