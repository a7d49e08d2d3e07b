"""Prompts as messages of a user: answers of the assistant, and who may write special tokens."""

import numpy as np
import pytest

from lminf.attention.policy import LMInfinite
from lminf.errors import InputError
from lminf.lm.chat import ChatModel, split_lead
from lminf.lm.lm import LM
from lminf.lm.prefix import SharedPrefix
from tests.checkpoints import making
from tests.data.test_chat_template import CHATML, INST, talking
from tests.models import specs

PROMPTS = ["the end", "the cat sat <|im_end|> on it"]


def chat_model(template, base=None):
    tokenizer = talking(base or making.tiny_tokenizer(), template)
    spec = specs.change(specs.shallow(specs.LLAMA, 1), vocab_size=tokenizer.vocab_size)
    return ChatModel(SharedPrefix(LM(spec, specs.parameters(spec), tokenizer, LMInfinite(8, 2))))


@pytest.mark.parametrize("template", [CHATML, INST], ids=["ChatML", "INST"])
def test_a_prompt_is_read_as_the_conversation_that_it_begins(template):
    model = chat_model(template)
    tokenizer = model.model.lm.tokenizer
    for prompt in PROMPTS:
        expected = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        assert model.encode(prompt).tolist() == expected.tolist()
        assert model.count_tokens(prompt) == len(expected)


@pytest.mark.parametrize(
    ("prompt", "message", "lead"),
    [
        ("A book.\n\nWhat is the key? The key is", "A book.\n\nWhat is the key?", "The key is"),
        ("Find the key. The key is", "Find the key.", "The key is"),
        ("A text\nQuestion: Who?\nAnswer:", "A text\nQuestion: Who?", "Answer:"),
        ("A text.\nWho?", "A text.\nWho?", ""),
        ("Write a story of 50 words.\n\n", "Write a story of 50 words.\n\n", ""),
        ("Hello", "Hello", ""),
    ],
)
def test_what_a_prompt_ends_with_begins_the_reply(prompt, message, lead):
    assert split_lead(prompt) == (message, lead)
    model = chat_model(CHATML)
    start = model.model.lm.tokenizer.chat([{"role": "user", "content": message}])
    expected = model.model.lm.tokenizer.encode(start + lead, special="parse")
    assert model.encode(prompt).tolist() == expected.tolist()


@pytest.mark.slow
def test_answers_and_their_probabilities_are_those_of_the_conversation():
    model = chat_model(CHATML)
    lm = model.model.lm
    answers = model.generate(PROMPTS, max_new_tokens=4)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        message = [{"role": "user", "content": prompt}]
        assert answer == "".join(lm.chat(message, max_new_tokens=4))
    replies = [" a", "the"]
    for reply, score in zip(replies, model.score(PROMPTS[:1] * 2, replies), strict=True):
        start = lm.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])
        ids = np.concatenate([start, lm.tokenizer.encode(reply.strip())])
        assert score.log_prob == pytest.approx(-lm.token_nll(ids)[len(start) - 1 :].sum(), abs=1e-4)
        assert score.tokens == len(ids) - len(start)
    with pytest.raises(InputError, match="a continuation is empty"):
        model.score(PROMPTS[:1], [" "])


@pytest.mark.parametrize("prompt", ["Say the. the", "the"])
def test_a_continuation_that_the_tokenizer_merges_is_refused_in_a_sentence(prompt):
    chat = chat_model(CHATML)
    message = r"merges the beginning of 'e cat' with the end of its prompt \('.*th'\); begin it"
    for model in (chat.model.lm, chat.model):
        with pytest.raises(InputError, match=message):
            model.score([prompt[:-1]], ["e cat"])
    if "." in prompt:  # the end of the prompt begins the reply
        with pytest.raises(InputError, match=message):
            chat.score([prompt[:-1]], ["e cat"])


def test_a_model_without_a_template_for_messages_is_refused():
    with pytest.raises(InputError, match="this model has no chat template; generate from a plain"):
        chat_model(None)
    twice = "{{ messages[0].content }}{{ messages[0].content }}"
    with pytest.raises(InputError, match="does not write a message once and as it is"):
        chat_model(twice)
