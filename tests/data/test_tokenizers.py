import dataclasses
import datetime

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from lminf.checkpoints import gguf_tokenizer
from lminf.data import tokenizers as ours
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from tests.checkpoints import making

PIECES = ["▁the", "▁t", "he", "▁c", "at", "▁cat", "th", "ca", "▁▁", *"▁theca"]


def sentence_piece(*, prefix: bool):
    """A vocabulary as SentencePiece makes them: bytes for what has no token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    return gguf_tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": prefix,
        },
        "memory",
    )


TOKENIZERS = {
    "byte-level": making.tiny_tokenizer(),
    "bytes": ByteTokenizer(),
    "SentencePiece": sentence_piece(prefix=True),
    "SentencePiece without prefix": sentence_piece(prefix=False),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
TEXTS = st.text(
    st.one_of(st.sampled_from("the cat\n 19"), st.characters(exclude_categories=["Cs"]))
)


@each
@given(text=TEXTS)
def test_decoding_an_encoded_text_gives_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


@each
@given(text=TEXTS)
def test_ends_never_fall_and_reach_the_end_of_the_text(tokenizer, text):
    ids, ends = tokenizer.encode_with_bytes(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert len(ends) == len(ids)
    assert (np.diff(ends, prepend=0) >= 0).all()
    assert (ends[-1] if len(ends) else 0) == len(text.encode())


@each
@given(text=TEXTS)
def test_text_decoded_token_by_token_is_the_text_and_never_half_a_character(tokenizer, text):
    stream = tokenizer.incremental()
    parts = [stream.feed(i) for i in tokenizer.encode(text)]
    whole = "".join(parts) + stream.finish()
    assert whole.removeprefix(" " if tokenizer is TOKENIZERS["SentencePiece"] else "") == text
    assert "\ufffd" not in "".join(parts).replace("\ufffd" if "\ufffd" in text else "", "")


@each
@given(text=TEXTS)
def test_ends_are_where_the_decoded_prefix_ends(tokenizer, text):
    ids, ends = tokenizer.encode_with_bytes(text)
    for count in range(len(ids)):
        said = tokenizer.decode(ids[:count]).rstrip("\ufffd").encode()
        assert text.encode()[: ends[count - 1] if count else 0].startswith(
            said.rstrip(b"\xef\xbf\xbd")
        )


def test_half_a_character_waits_for_the_other_half_and_is_marked_if_it_never_comes():
    stream = ByteTokenizer().incremental()
    assert [stream.feed(b) for b in "é".encode()] == ["", "é"]
    assert stream.feed("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


@given(words=st.lists(st.sampled_from(["the", "cat", "<s>", "12", "\n", "é", ","]), max_size=60))
def test_a_text_encoded_in_pieces_gives_the_tokens_of_the_whole(words):
    tokenizer, text = TOKENIZERS["byte-level"], " ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "PIECE_CHARS", 7)
        patch.setattr(ours, "PIECES_AT_ONCE", 2)
        ids = tokenizer.encode(text, special="parse")
    assert ids.tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_only_tokenizers_that_put_nothing_before_a_text_are_given_pieces():
    assert TOKENIZERS["byte-level"]._divisible
    assert not TOKENIZERS["SentencePiece"]._divisible


def test_sentence_piece_takes_the_best_tokens_and_spells_the_rest():
    tokenizer = TOKENIZERS["SentencePiece"]
    said = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("the cat é")]
    assert said == ["▁the", "▁cat", "▁", "<0xC3>", "<0xA9>"]
    bare = TOKENIZERS["SentencePiece without prefix"]
    assert [bare.backend.id_to_token(i) for i in bare.encode("the")] == ["t", "he"]


def test_special_tokens_written_out_are_recognised_on_demand_and_bos_is_never_added():
    tokenizer = TOKENIZERS["byte-level"]
    assert tokenizer.add_bos
    assert tokenizer.encode("<s>the", special="parse")[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in tokenizer.encode("<s>the")
    assert tokenizer.bos_id not in tokenizer.encode("the")


def test_ends_of_a_normalised_text_are_those_of_its_characters():
    plain = making.tiny_tokenizer()
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = dataclasses.replace(plain, backend=backend)
    text = "the cafe\u0301 cat"
    ids, ends = tokenizer.encode_with_bytes(text)
    assert tokenizer.decode(ids) == "the caf\u00e9 cat"
    assert ends[-1] == len(text.encode())
    assert (np.diff(ends, prepend=0) >= 0).all()


def test_ids_of_padding_rows_say_nothing():
    tokenizer = TOKENIZERS["byte-level"]
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("the")]) == "the"


def test_texts_end_where_the_files_say_and_at_known_markers():
    tokenizer = dataclasses.replace(making.tiny_tokenizer(), end_ids=(7,))
    marker = tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.eos_ids == (7, marker)
    assert ByteTokenizer().eos_ids == (256,)
    assert TOKENIZERS["SentencePiece"].eos_ids == (2,)


def test_digests_tell_tokenizers_apart():
    digests = {tokenizer.digest for tokenizer in TOKENIZERS.values()}
    assert len(digests) == len(TOKENIZERS)
    assert ByteTokenizer().digest in digests


def test_bytes_and_their_backend_agree():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    text = "the é\n"
    assert tokenizer.encode(text).tolist() == tokenizer.backend.encode(text).ids


@each
def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match="character 1 of the text is half"):
        tokenizer.encode("a\ud800")


def test_a_tokenizer_of_another_kind_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="decodes with WordPiece"):
        dataclasses.replace(making.tiny_tokenizer(), backend=backend).decode([0])


# --- Chat -----------------------------------------------------------------------------------------


def chat(template, messages=({"role": "user", "content": "hi"},), **more):
    tokenizer = dataclasses.replace(making.tiny_tokenizer(), chat_template=template)
    return tokenizer.chat(messages, **more)


def test_templates_render_as_transformers_renders_them():
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n"
        "[{{ m.content }}]\n    {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert chat(template) == "<s>\n[hi]\nA:"
    assert chat(template, reply=False) == "<s>\n[hi]\n"


def test_templates_may_use_what_transformers_gives_them():
    assert chat("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert chat("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert (
        chat("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "012"
    )
    assert chat("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert chat("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}") == "2"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ unfinished",
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_one_sentence(template):
    with pytest.raises(InputError, match="the chat template refused these messages"):
        chat(template)


def test_a_model_without_a_template_says_so():
    with pytest.raises(InputError, match="no chat template"):
        chat(None)
