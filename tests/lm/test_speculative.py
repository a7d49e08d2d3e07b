"""Speculative decoding: the tokens of plain decoding, whatever a draft proposes."""

import dataclasses
import re
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lminf.attention import rope
from lminf.attention.policies.block_topk import MoBA
from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
from lminf.attention.policies.hip import HiP, InfiniteHiP
from lminf.attention.policies.infllm import InfLLM
from lminf.attention.policies.longheads import LongHeads
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policies.topk import TopK
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    PerLayer,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.data.tokenizers import ByteTokenizer
from lminf.errors import InputError
from lminf.lm import speculative
from lminf.lm.acceptance import RAPID
from lminf.lm.drafts import (
    ModelDraft,
    PromptLookup,
    RetrievedDraft,
    first_layers,
    parse_draft,
)
from lminf.lm.generate import GREEDY, Sampling, distribution, generate_tokens
from lminf.lm.lm import LM
from lminf.lm.retrieval import Retrieval
from lminf.lm.speculative import Proposal, Speculation
from lminf.models import heads
from tests.lm.test_acceptance import published_law, shifted
from tests.models import specs
from tests.stated_ranges import outside, without_range

PROMPTS = ["Twenty bytes of text", "Seven b", "Eleven byte"]  # 20, 7 and 11 tokens
NEW = 24
POLICIES = {
    "window": Window(8),
    "lambda": Lambda(6, 3),
    "lm_infinite": LMInfinite(8, 2),
    "streaming": Streaming(5, 3),
    "rerope": ReRoPE(8),
    "leaky": LeakyReRoPE(8, 4),
    "self_extend": SelfExtend(8, 4),
    "per_head": PerHead((LMInfinite(7, 2), Streaming(4, 3))),
    "per_head_mixed": PerHead((Full(), LMInfinite(6, 3))),
    "snapkv": SnapKV(6, window=2, pooling=3),
    "think": ThinK(0.5, recent=4),
    "snapkv_and_window": PerLayer((SnapKV(6, window=2, pooling=3), LMInfinite(8, 2))),
    "topk": TopK(8, sinks=2, topk=3, from_layer=1),
    "infllm": InfLLM(window=8, sinks=2, topk=1, block=4, repr_topk=1, exec_block=8),
    "longheads": LongHeads(12, chunk=4),
    "moba": MoBA(block=4, topk=2),
    "h2o": H2O(12, sinks=2, recent=2, turn=4),
    "tova": TOVA(12, turn=4),
    "hip": HiP(
        topk=4, window=4, sinks=2, block=2, query_block=4, query_stride=2, refresh=3, dense_layers=1
    ),
    "infinite_hip": InfiniteHiP(
        (4, 2), (8, 4), (5, 2), window=4, sinks=2, query_block=4, ordered_layers=1
    ),
    "sirllm_and_moba": PerLayer((SirLLM(12, sinks=2, recent=2, turn=4), MoBA(block=4, topk=2))),
}


@dataclass(frozen=True)
class Guesses:
    """Proposes what will be written, but for tokens that it gets wrong, and sometimes less."""

    written: np.ndarray  # [B, new]
    right: float = 0.8
    least: int = 0  # tokens that it proposes

    def start(self, lm, prompts, **settings):
        del lm, settings
        self.lengths.extend(len(prompt) for prompt in prompts)
        return self

    lengths: list = dataclasses.field(default_factory=list)

    def propose(self, texts, k, *, key):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).sum())
        tokens = np.full((len(texts), k), -1, np.int32)
        for row, (text, length) in enumerate(zip(texts, self.lengths, strict=True)):
            known = self.written[row, len(text) - length :][: rng.integers(self.least, k + 1)]
            wrong = rng.random(len(known)) > self.right
            tokens[row, : len(known)] = np.where(wrong, (known + 1) % 256, known)
        return Proposal(tokens)


def plain_tokens(lm, prompts, *, new=NEW):
    """[B, new] tokens."""
    encoded = lm.encode_prompts(prompts)
    stream = generate_tokens(
        lm, encoded, sampling=GREEDY, max_new_tokens=new, key=jax.random.key(0)
    )
    return np.stack(list(stream), 1)


def rounds_of(lm, prompts, draft, *, k=5, new=NEW, sampling=GREEDY, **settings):
    """The rounds, and the tokens of each row."""
    speculation = Speculation(draft, k, **settings)
    rounds = list(
        speculative.rounds(
            lm, lm.encode_prompts(prompts), speculation, sampling=sampling, max_new_tokens=new,
            key=jax.random.key(0),
        )
    )  # fmt: skip
    return rounds, [np.concatenate(row) for row in zip(*(r.tokens for r in rounds), strict=True)]


def test_greedy_tokens_are_those_of_plain_decoding_and_rows_go_at_their_own_pace(lm, small_steps):
    plain = plain_tokens(lm, PROMPTS)
    rounds, tokens = rounds_of(lm, PROMPTS, Guesses(plain, least=1))
    np.testing.assert_array_equal(tokens, plain)
    assert any(len({len(new) for new in each.tokens}) > 1 for each in rounds)
    assert sum(each.target_calls for each in rounds) < NEW - 5
    accepted = sum(each.accepted for each in rounds)
    assert 0.3 < accepted / sum(each.drafted for each in rounds) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_greedy_tokens_are_those_of_plain_decoding_under_every_policy(lm, name, small_steps):
    """Rings wrap around, and what is rejected has overwritten what stood there."""
    lm = dataclasses.replace(lm, policy=POLICIES[name])
    plain = plain_tokens(lm, PROMPTS)
    for right in (0.8, 0.3):
        _, tokens = rounds_of(lm, PROMPTS, Guesses(plain, right))
        np.testing.assert_array_equal(tokens, plain)


def test_a_policy_whose_queries_select_in_groups_is_refused(lm):
    class Grouped(HiP):
        one_by_one = None

    with pytest.raises(InputError, match=r"for several tokens.*otherwise.*leave the draft out, or"):
        rounds_of(lm.with_policy(Grouped(4, 4)), PROMPTS, PromptLookup())


def test_schedules_that_follow_the_length_are_refused(lm):
    with pytest.raises(InputError, match="DynamicNTK rotates keys anew with every token"):
        rounds_of(lm.with_scaling(rope.DynamicNTK(2.0, 16)), PROMPTS, PromptLookup())


@pytest.mark.parametrize("rounding", [1e5, 1e9])
def test_tokens_within_rounding_are_read_as_plain_decoding_does(
    lm, rounding, small_steps, monkeypatch
):
    """Some tokens, and all, are taken for as good as equal to others."""
    monkeypatch.setattr(speculative, "ROUNDING", rounding)
    plain = plain_tokens(lm, PROMPTS)
    rounds, tokens = rounds_of(lm, PROMPTS, Guesses(plain, least=1))
    np.testing.assert_array_equal(tokens, plain)
    calls, accepted = (
        sum(getattr(r, name) for r in rounds) for name in ("target_calls", "accepted")
    )
    # Each token is read again at most once, and beside that there is a call a round.
    assert len(rounds) < calls <= NEW - 1 + len(rounds) - 1
    assert (accepted == 0) == (rounding > 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infllm", "hip", "snapkv"])
def test_models_that_see_less_draft_for_full_attention(lm, name, small_steps):
    full, policy = lm.with_policy(Full()), POLICIES[name]
    plain = plain_tokens(full, PROMPTS)
    rounds, tokens = rounds_of(full, PROMPTS, ModelDraft(lm.with_policy(policy)))
    np.testing.assert_array_equal(tokens, plain)
    assert sum(each.target_calls for each in rounds) < NEW - 1


@pytest.mark.slow
def test_what_reading_together_changes_is_far_less_than_a_logit_must_lead_by(lm, small_steps):
    """In units of rounding: seen 13, of 256."""
    read = speculative.read_prompts(
        lm, [np.arange(20)], room=8, spare=8, sampling=GREEDY, key=jax.random.key(0)
    )
    tokens, positions = np.arange(8, dtype=np.int32)[None], np.arange(20, 28, dtype=np.int32)[None]
    together, _ = lm.forward(tokens, positions, read.rewindable)
    caches, alone = read.plain, []
    for index in range(8):
        place = np.s_[:, index : index + 1]
        hidden, caches = lm.forward(tokens[place], positions[place], caches)
        alone.append(heads.lm(lm.spec, lm.params, hidden))
    alone, together = jnp.concatenate(alone, 1), heads.lm(lm.spec, lm.params, together)
    unit = jnp.finfo(jnp.float32).eps * jnp.abs(alone).max(-1, keepdims=True)
    assert 0 < float((jnp.abs(alone - together) / unit).max()) < speculative.ROUNDING / 8


@pytest.mark.slow
def test_a_draft_that_is_the_model_itself_is_always_accepted(lm, small_steps):
    """Drawn tokens too: its distributions are those of the model, but for rounding."""
    for sampling in (GREEDY, Sampling(0.9, top_p=0.8)):
        rounds, tokens = rounds_of(lm, PROMPTS, ModelDraft(lm), k=3, new=13, sampling=sampling)
        assert [each.accepted for each in rounds] == [0, 9, 9, 9]
        assert [len(row) for row in tokens] == [13] * 3
    assert len({tuple(row) for row in tokens}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["first layer", "lookup"])
def test_drawn_tokens_follow_the_model(lm, draft, small_steps):
    """1,000 rows that begin alike; the second and third token, whose laws are summed over the
    first, given the first one that is most often drawn.
    """
    sampling, rows = Sampling(1.0, top_k=3), 1000
    proposing = PromptLookup() if draft == "lookup" else ModelDraft(first_layers(lm, 1))
    prompt = lm.tokenizer.encode(PROMPTS[0])
    _, tokens = rounds_of(lm, [prompt] * rows, proposing, k=2, new=3, sampling=sampling)
    tokens = np.stack(tokens)
    for place in (1, 2):
        begun = [tuple(row) for row in tokens[:, :place]]
        common = max(sorted(set(begun)), key=begun.count)
        following = tokens[[each == common for each in begun], place]
        logits = jnp.asarray(lm.logits([np.append(prompt, common)])[0])
        probs = np.asarray(distribution(logits, sampling)[0], float)
        counts = np.bincount(following, minlength=len(probs))
        assert (counts[probs == 0] == 0).all()
        likely = probs > 0
        expected = len(following) * probs[likely] / probs.sum()
        assert stats.chisquare(counts[likely], expected).pvalue > 1e-3


@pytest.mark.slow
def test_text_is_streamed_and_stops_as_without_a_draft(lm, small_steps):
    drafting = lm.with_draft(Guesses(plain_tokens(lm, PROMPTS)), num_draft_tokens=5)
    texts = lm.generate(PROMPTS, max_new_tokens=NEW)
    pieces = list(drafting.stream(PROMPTS, max_new_tokens=NEW))
    assert ["".join(piece for row, piece in pieces if row == n) for n in range(3)] == texts
    assert len(pieces) > 6
    stop = texts[0][3:5]
    drafting = lm.with_draft(PromptLookup(), num_draft_tokens=5)
    stopped = drafting.generate(PROMPTS[0], max_new_tokens=NEW, stop=[stop])
    assert stopped == texts[0][: texts[0].find(stop)]
    assert drafting.generate(PROMPTS[0], max_new_tokens=1) == texts[0][:1]


# --- Drafts ---------------------------------------------------------------------------------------


def test_prompt_lookup_continues_the_longest_ngram_where_it_last_stood():
    def proposed(text, k=4, ngram=3):
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        found = PromptLookup(ngram).propose([tokens], k, key=jax.random.key(0)).tokens[0]
        return "".join(chr(token) for token in found if token >= 0)

    assert proposed("the cat and the dog, the c") == "at a"
    assert proposed("abc1 bc2 c3 abc") == "1 bc"  # the longest, not the last
    assert proposed("abc1 abc2 abc") == "2 ab"  # of equals the last
    assert proposed("xabc1 yabc2 xabc", ngram=4) == "1 ya"
    assert proposed("no") == proposed("x") == ""
    assert proposed("...") == "...."  # a repetition goes on
    assert proposed("abab", k=5) == "ababa"


@pytest.mark.slow
def test_the_first_layers_are_a_model_of_their_own():
    spec = specs.change(specs.MIXED, vocab_size=257)
    lm = LM(spec, specs.parameters(spec), ByteTokenizer())
    policy = PerLayer((LMInfinite(8, 2), Full()))
    for count in (1, 3):  # the first is no mixture of experts
        shallow = first_layers(lm.with_policy(policy), count)
        assert len(shallow.decoder.policies) == shallow.spec.num_layers == count
        assert shallow.logits(["some text"]).shape == (1, 1, 257)
    for count in (0, 4):
        with pytest.raises(InputError, match=rf"layers:{count}: the model has 4 layers; give 1"):
            first_layers(lm, count)


def test_drafts_that_mean_nothing_are_refused_in_a_sentence(lm):
    def parsed(text, load=None):
        return parse_draft(text, model="smollm2", load=load)(lm)

    assert parsed("prompt_lookup:ngram=2") == PromptLookup(2)
    assert parsed("policy:window:window=4").lm.policy == Window(4)
    other = SimpleNamespace(tokenizer=SimpleNamespace(digest="another"))
    for text, message in {
        "prompt_lookup:ngram=0": "PromptLookup.ngram is 0; give a whole number of at least 1",
        "prompt_lookup:n=2": "prompt_lookup has no field 'n'",
        "layers:two": "the draft 'layers:two' has no number of layers; write layers:8",
        "layers:2": "layers:2: the model has 2 layers; give 1 to 1",
        "retrived:tokens=64": "there is no draft called 'retrived'; did you mean 'retrieved'?",
        "policy:lm_infinit": "no policy is called 'lm_infinit'",
        "qwen": "the draft qwen has another tokenizer than smollm2",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            parsed(text, load=lambda name: other)
    with pytest.raises(InputError, match="num_draft_tokens is 0; give a whole number of at least"):
        lm.with_draft(PromptLookup(), num_draft_tokens=0)
    with pytest.raises(InputError, match="RAPID shifts probabilities, but at temperature 0"):
        rounds_of(lm, PROMPTS, PromptLookup(), rule=RAPID(1.0))
    with pytest.raises(InputError, match=r"the draft's h2o.* evicts tokens that would be needed"):
        rounds_of(lm, PROMPTS, ModelDraft(lm.with_policy(POLICIES["h2o"])))


# --- Drafts that read less of the prompt ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "retrieved"])
def test_a_draft_may_read_a_shorter_context(lm, kind, small_steps):
    """As RAPID's, which reads what was retrieved."""
    short = [lm.tokenizer.encode(prompt)[-5:] for prompt in PROMPTS]
    draft = ModelDraft(lm, short)
    if kind == "retrieved":
        draft = RetrievedDraft(lm, Retrieval(9, chunk=3, question=4))
    plain = plain_tokens(lm, PROMPTS)
    _, tokens = rounds_of(lm, PROMPTS, draft)
    np.testing.assert_array_equal(tokens, plain)
    rule, drawn = RAPID(20.0), Sampling(1.0)
    rounds, tokens = rounds_of(lm, PROMPTS, draft, sampling=drawn, rule=rule)
    assert [len(row) for row in tokens] == [NEW] * 3
    assert sum(each.accepted for each in rounds) > 0


@pytest.mark.slow
@pytest.mark.parametrize("residual_of", ["shifted", "published"])
def test_drawn_tokens_follow_the_law_of_rapid(lm, residual_of, small_steps):
    """2,000 rows that begin alike, their second token given the first one that is most often drawn:
    p reads the whole prompt, and q what was retrieved of it.
    """
    sampling, rows, eta = Sampling(0.3), 2000, 8.0
    retrieval = Retrieval(9, chunk=3, question=4)
    prompt = lm.tokenizer.encode(PROMPTS[0])
    _, tokens = rounds_of(
        lm, [prompt] * rows, RetrievedDraft(lm, retrieval), k=1, new=3, sampling=sampling,
        rule=RAPID(eta, residual_of=residual_of),
    )  # fmt: skip
    firsts = [row[0] for row in tokens]
    common = max(sorted(set(firsts)), key=firsts.count)
    seconds = [row[1] for row in tokens if row[0] == common]
    p, q = (
        np.asarray(distribution(jnp.asarray(lm.logits([np.append(read, common)])[0]), sampling)[0])
        for read in (prompt, retrieval.of(lm.tokenizer, prompt))
    )
    law = {"shifted": shifted, "published": published_law}[residual_of](p, q, eta)
    assert np.abs(law - p).sum() > 0.2
    expected, counts = len(seconds) * law / law.sum(), np.bincount(seconds, minlength=len(law))
    often = expected >= 5
    expected, counts = (np.append(x[often], x[~often].sum()) for x in (expected, counts))
    assert stats.chisquare(counts, expected).pvalue > 1e-3


class Words:
    """A tokenizer of words, with a token 0 before each text."""

    add_bos, bos_id = True, 0
    words = ("<bos>", "the", "bee", "cat", "sea", "hive", "where", "is")

    def decode(self, ids):
        return " ".join(self.words[token] for token in ids)


def test_what_fits_the_end_of_a_prompt_is_retrieved_in_its_order():
    """Chunks of two words; the bee stands in the second and the fifth, the hive in the fourth."""
    prompt = np.array([0, 1, 3, 1, 2, 1, 4, 5, 1, 2, 1, 4, 6, 7, 2, 5])
    chunks = [prompt[1:3], prompt[3:5], prompt[5:7], prompt[7:9], prompt[9:11], prompt[11:12]]
    for size, kept in ((7, [3]), (9, [1, 3]), (10, [1, 3]), (11, [1, 3, 4])):
        read = Retrieval(size, chunk=2, question=4).of(Words(), prompt)
        expected = [prompt[:1], *(chunks[index] for index in kept), prompt[12:]]
        np.testing.assert_array_equal(read, np.concatenate(expected))
        assert len(read) <= size
    np.testing.assert_array_equal(Retrieval(16, chunk=2, question=4).of(Words(), prompt), prompt)


def test_a_retrieval_that_holds_no_chunk_is_refused():
    with pytest.raises(InputError, match="a chunk of 64 tokens and a question of 32 take more"):
        parse_draft("retrieved:tokens=95", model="smollm2", load=lambda name: None)
    assert without_range(Retrieval) == []
    for field, value in outside(Retrieval):
        with pytest.raises(InputError, match=rf"Retrieval\.{field} is "):
            Retrieval(**({"tokens": 512} | {field: value}))
