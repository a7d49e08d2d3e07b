"""What counts as an answer in form, and what repair takes from the chat model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.errors import InputError
from lminf.experiments import chat_repair
from lminf.run import request


def config(**fields):
    parsed = request.parse("chat_repair", ["--config=chat_repair:tiny"])
    assert parsed is not None
    parsed.config.update(fields)
    return parsed.config


@pytest.fixture
def chat(random_lm):
    return chat_repair.with_template(random_lm)


def test_the_template_of_a_model_without_one_writes_special_tokens(chat):
    ids = chat.tokenizer.encode_chat([{"role": "user", "content": "Hi <bos>"}])
    assert ids.tolist() == [256, *b"user: Hi <bos>", 256]
    assert chat_repair.template_ids(chat.tokenizer) == [256]


def test_an_answer_in_form_ends_and_writes_no_special_token_before(chat):
    ids = chat.tokenizer.eos_ids
    assert ids == (256,)
    for answer, good in (([5, 6, 256], True), ([256], True), ([5, 6], False),
                         ([256, 5, 256], False)):  # fmt: skip
        assert chat_repair.in_form(chat.tokenizer, np.array(answer)) == good


def test_an_answer_stops_at_its_first_end(chat, monkeypatch):
    steps = [np.array(step) for step in ([5, 7], [256, 8], [9, 8], [256, 8])]
    monkeypatch.setattr(chat_repair.generate, "generate_tokens", lambda *_, **__: iter(steps))
    answers = chat_repair.written(chat, [], 4)
    assert [answer.tolist() for answer in answers] == [[5, 256], [7, 8, 8, 8]]


@pytest.mark.slow
def test_repair_takes_a_share_of_each_outer_layer_and_the_special_rows(chat):
    trained = dataclasses.replace(chat, params=jax.tree.map(lambda x: x + 1.0, chat.params))
    c = config(chat_shares=(0.25, 0.75))
    repaired = chat_repair.version_of(c, "linear", chat, chat, trained).params
    for layer, share in enumerate(c.chat_shares):
        before, after = (params["layers"]["mlp"]["w_up"][layer] for params in
                         (chat.params, repaired))  # fmt: skip
        np.testing.assert_allclose(after, before + (1 - share), atol=1e-5)
    moved = jnp.abs(repaired["embed"] - chat.params["embed"]).max(-1)
    np.testing.assert_allclose(moved, np.arange(257) != 256, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"versions": ("lineer",)}, "no version is called 'lineer'; did you mean 'linear'"),
        ({"questions": 99}, "--config.questions=99: there are 12; ask at most these"),
        ({"chat_shares": (0.3,)}, "give an even number, half of them for the first layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        chat_repair.check(config(**fields))
