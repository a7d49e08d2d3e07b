"""What is asked at each budget, by which methods, and what the experiment refuses."""

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.evals.suites.ruler import QUESTION, TASK
from lminf.experiments import _lookup_budget, _lookups, context_budget
from lminf.run import request


def test_rows_ask_in_a_chunk_of_their_own_about_their_own_context():
    batch = _lookup_budget.LookupTexts(length=24, chunk=8, rows=5, seed=0).batch(3)
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        facts = {(x - _lookups.FACT) // 8: (x - _lookups.FACT) % 8
                 for x in tokens[:24].tolist() if x < _lookups.KEY}  # fmt: skip
        np.testing.assert_array_equal(np.flatnonzero(weights), [25, 27, 29, 31])
        for place in np.flatnonzero(weights):
            key, value = tokens[place - 1] - _lookups.KEY, tokens[place] - _lookups.VALUE
            assert facts[key] == value


def test_a_prompt_is_split_before_its_question():
    question = QUESTION.format(keys="bees")
    assert context_budget.split(TASK + "Some prose.\n\nMore of it." + question) == (
        TASK + "Some prose.\n\nMore of it.", question
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("methods", ("bm42",), "there is no method 'bm42'; did you mean 'bm25'"),
        ("lookups.methods", ("bm25",), "there is no method 'bm25'; "),
        ("lookups.length", 30, r"lookups\.length=30: contexts are read in chunks of 16; give a m"),
    ],
)
def test_settings_that_cannot_work_are_refused(field, value, message):
    config = request.parse("context_budget", ["--config=context_budget:tiny"]).config
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        context_budget.check(config)
