"""Generation: what greedy decoding must be, unequal prompts, stop strings, compilations."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lminf import kernels
from lminf.attention.policy import LMInfinite, SelfExtend
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm.generate import GREEDY, Sampling, TextStream, generate_tokens
from lminf.models import decoder, heads
from tests.attention import cases
from tests.cases import compilations
from tests.models import specs

PROMPTS = ["Twenty bytes of text", "Seven b", "Eleven byte"]  # 20, 7 and 11 tokens
NEW = 10


def tokens_after(lm, prompts, *, sampling=GREEDY, new=NEW, seed=0):
    """[B, new] tokens."""
    encoded = [lm.tokenizer.encode(prompt) for prompt in prompts]
    stream = generate_tokens(
        lm, encoded, sampling=sampling, max_new_tokens=new, key=jax.random.key(seed)
    )
    return np.stack(list(stream), 1)


def test_greedy_decoding_is_the_argmax_of_the_whole_text(lm, small_steps):
    """The prompt takes two chunks, one of them padded; every token comes through the caches."""

    @cases.compiled
    def following(params, tokens):
        at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden, _ = lm.decoder.apply({"params": params}, tokens, positions=at)
        return heads.lm(lm.spec, params, hidden[0]).argmax(-1)

    text = np.zeros((1, 32), np.int32)
    text[0, :20] = lm.tokenizer.encode(PROMPTS[0])
    for end in range(20, 20 + NEW):
        text[0, end] = following(lm.params, text)[end - 1]
    np.testing.assert_array_equal(tokens_after(lm, PROMPTS[:1])[0], text[0, 20 : 20 + NEW])


@pytest.mark.slow
def test_prompts_of_unequal_length_are_each_alone(lm, small_steps):
    together = tokens_after(lm, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(together[row], tokens_after(lm, [prompt])[0])


def test_decoding_compiles_once_for_all_lengths(lm, small_steps):
    tokens_after(lm, PROMPTS[:1])
    with compilations() as compiled:
        for prompt, new in (("a prompt", 11), ("another prompt, longer", 9), ("another", 24)):
            # The same room for layers that keep everything.
            assert len(prompt) + new in range(17, 33)
            tokens_after(lm, [prompt], new=new)
        for temperature in (0.5, 2.0):  # greedy was the first
            list(lm.stream(PROMPTS[:1], max_new_tokens=3, sampling=Sampling(temperature)))
    assert not {"jit(run_layer)", "jit(next_token)"} & set(compiled), compiled
    rows = tokens_after(lm, PROMPTS[:1], new=1)
    assert rows.shape == (1, 1)


@pytest.mark.slow
def test_a_seed_fixes_what_is_drawn(lm, small_steps):
    shallow = dataclasses.replace(
        lm,
        spec=specs.shallow(lm.spec, 1),
        params={**lm.params, "layers": jax.tree.map(lambda w: w[:1], lm.params["layers"])},
        policy=LMInfinite(8, 2),
    )

    def draw(seed):
        drawn = Sampling(temperature=2.0)
        return tokens_after(shallow, PROMPTS[1:2], sampling=drawn, seed=seed)[0]

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()
    assert len(set(draw(3))) > NEW // 2  # each step has a key of its own


def test_text_is_what_the_tokens_say_up_to_the_stop_string(lm, small_steps):
    tokens = tokens_after(lm, PROMPTS[:1])[0]
    text = lm.generate(PROMPTS[0], max_new_tokens=NEW)
    assert text == lm.tokenizer.decode(tokens)
    stop = text[3:5]
    expected = text[: text.find(stop)]
    assert lm.generate(PROMPTS[0], max_new_tokens=NEW, stop=[stop]) == expected
    assert lm.generate(PROMPTS[0], max_new_tokens=NEW, stop=stop) == expected
    together = lm.generate(PROMPTS, max_new_tokens=NEW)
    assert together[0] == text
    assert len(together) == 3


# --- Bad input ------------------------------------------------------------------------------------


def test_prompts_and_budgets_that_cannot_be_are_refused(lm):
    with pytest.raises(InputError, match="the text is empty"):
        lm.generate("")
    with pytest.raises(InputError, match="a prompt has no tokens; give at least one"):
        lm.generate([])
    with pytest.raises(InputError, match="max_new_tokens=0: give at least 1"):
        lm.generate("abc", max_new_tokens=0)
    with pytest.raises(InputError, match="no chat template"):
        list(lm.chat([{"role": "user", "content": "hello"}]))


def test_a_prompt_that_the_policy_cannot_place_is_refused(lm):
    extended = lm.with_policy(SelfExtend(window=8, group=2))
    # (32 - 8) * 2 + 8 tokens
    with pytest.raises(InputError, match=r"places at most 56 tokens within the 32 .* take 57"):
        extended.generate("x" * 47, max_new_tokens=10)
    for policy in (LMInfinite(8, 2), lm.policy):
        lm.with_policy(policy).check_length(10**9)


def test_caches_that_the_device_cannot_hold_are_refused(lm, monkeypatch):
    monkeypatch.setattr("lminf.parallel.hardware.memory_bytes", lambda _: 20_000_000)
    forgets = lm.with_policy(LMInfinite(8, 2))
    assert forgets.init_caches(batch=1, capacity=10**9)[0].k.shape[2] == 10
    for act in (
        lambda: lm.generate("abc", max_new_tokens=200_000),
        lambda: list(lm.stream_nll([], longest=200_000)),
    ):
        with pytest.raises(InputError, match=r"the caches of 20\d{4} tokens take .* 0.0 GB; read"):
            act()


# --- Text out of tokens ---------------------------------------------------------------------------


def pieces_tokenizer(pieces, ends=()):
    """Token i says pieces[i]."""
    decoder = SimpleNamespace(feed=lambda token: pieces[token], finish=lambda: "")
    return SimpleNamespace(incremental=lambda: decoder, eos_ids=ends)


LETTERS = st.text("ab", max_size=4)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_never_shown_wherever_tokens_split_them(pieces, stops):
    stream, shown = TextStream(pieces_tokenizer(pieces), stops), []
    for token in range(len(pieces)):
        shown.append(stream.feed(token))
        text = "".join(pieces[: token + 1])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:  # the first token that completes one ends the text
            assert stream.done
            assert "".join(shown) == text[: min(found)]
            assert stream.feed(token) == stream.finish() == ""
            return
        # What is held back could become a stop string, and no more than that is.
        held = text.removeprefix("".join(shown))
        assert held == max(
            (text[i:] for i in range(len(text) + 1) if any(s.startswith(text[i:]) for s in stops)),
            key=len,
            default="",
        )
    assert not stream.done
    assert "".join(shown) + stream.finish() == "".join(pieces)


def test_an_end_token_ends_a_row_and_shows_what_was_held():
    stream = TextStream(pieces_tokenizer(["one ", "st", "", "more"], ends=(2,)), ["stop"])
    assert [stream.feed(token) for token in (0, 1, 2, 3)] == ["one ", "", "st", ""]
    assert stream.done


def test_characters_are_shown_whole():
    stream = TextStream(ByteTokenizer(), ["é!"])
    shown = [stream.feed(byte) for byte in "né é!".encode()]
    assert shown == ["n", "", "", "é ", "", "", ""]
    half = TextStream(ByteTokenizer(), ["�"])
    assert half.feed("é".encode()[0]) + half.finish() == ""  # the end completes the stop string
    assert TextStream(ByteTokenizer(), [""]).feed(97) == "a"


# --- Chat -----------------------------------------------------------------------------------------


def test_a_chat_ends_at_a_stop_string(lm, small_steps):
    tokenizer = ByteTokenizer()
    object.__setattr__(tokenizer, "chat_template", "{{ messages[0].content }}")
    talking = dataclasses.replace(lm, tokenizer=tokenizer)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    text = lm.generate(PROMPTS[0], max_new_tokens=NEW)
    assert "".join(talking.chat(messages, max_new_tokens=NEW)) == text
    stopped = talking.chat(messages, max_new_tokens=NEW, stop=[text[3:5]])
    assert "".join(stopped) == text[: text.find(text[3:5])]


@pytest.mark.slow
def test_explain_names_the_kernels_that_reading_and_decoding_run(lm):
    """One for each policy of a period; nothing else attends."""
    module = lm.decoder
    caches = lm.init_caches(batch=1, capacity=32)

    def run(tokens, caches, first):
        at = first + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return module.apply({"params": lm.params}, tokens, positions=at, caches=caches)

    def kernels_of(caches, count, first):
        found = kernels.explain(run, jnp.zeros((1, count), jnp.int32), caches, first)
        return [(decision.op, decision.chosen) for decision in found]

    assert kernels_of(caches, 8, 0) == [("lambda_attention", "xla")] * 2
    ready = decoder.prepare_decoding(lm.spec, module.policies, caches, length=8, room=8)
    ready = tuple(each.for_decoding() for each in ready)
    assert kernels_of(ready, 1, 8) == [("lambda_decode", "xla")] * 2
