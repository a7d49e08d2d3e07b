"""Questions in long and short prompts, and what the experiment refuses."""

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import _lookups, longpo
from lminf.run import request


def test_a_short_prompt_is_a_part_of_the_long_one_that_holds_the_answer():
    prompts, answers = _lookups.questions((0,), 200, short=16, long=64)
    for (short, long), answer in zip(prompts, answers, strict=True):
        assert (len(short), len(long)) == (16, 64)
        assert short[:-1] in long[:-1]
        assert short[-1] == long[-1]
        key, value = ord(long[-1]) - _lookups.KEY, ord(answer) - _lookups.VALUE
        facts = [ord(x) - _lookups.FACT for x in short[:-1] if ord(x) < _lookups.KEY]
        assert [fact % 8 for fact in facts if fact // 8 == key] == [value]


def test_batches_ask_about_their_own_document_and_count_the_answers():
    batch = _lookups.Lookups(24, 6, seed=0).batch(0)
    for tokens, targets, weights in zip(*batch.values(), strict=True):
        facts = {(x - _lookups.FACT) // 8: (x - _lookups.FACT) % 8
                 for x in tokens.tolist() if x < _lookups.KEY}  # fmt: skip
        assert len(facts) == _lookups.KEYS
        answered = np.flatnonzero(weights)
        assert len(answered) >= 1
        for place in answered:
            assert targets[place] - _lookups.VALUE == facts[tokens[place] - _lookups.KEY]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("ppo",)}, "there is no method 'ppo'; "),
        ({"lengths": (8,)}, r"prompts of 8 characters do not hold 8 facts .*; give at least 12"),
        ({"length": 32}, r"tuning\.lengths=\(32,\): long prompts are longer than .*length=32$"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    config = request.parse("longpo", ["--config=longpo:tiny"]).config
    config.update(changes)
    with pytest.raises(InputError, match=message):
        longpo.check(config)
