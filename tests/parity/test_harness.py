"""lm-evaluation-harness asks our models and transformers' own: the same answers to all requests."""

import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lminf import LMInfinite
from lminf.attention.policy import Full, PerLayer
from lminf.errors import InputError
from lminf.lm.generate import Sampling

pytestmark = pytest.mark.parity

MAX_LENGTH = 64  # tokens, that the model is trained at
TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the
age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season
of Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair."""
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def harness():
    """lminf.evals.harness; of what lm_eval imports, some warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models import huggingface  # noqa: F401

        from lminf.evals import harness
    return harness


@pytest.fixture(scope="session", params=["with BOS", "without"])
def folder(peer, tmp_path_factory, request):
    """A random Llama with a tokenizer, as transformers saves them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    ))  # fmt: skip
    if request.param == "with BOS":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = peer.transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
        add_bos_token=request.param == "with BOS",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    peer.torch.manual_seed(0)
    config = peer.transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=MAX_LENGTH,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    peer.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def both(harness, folder):
    """(ours, the harness's own over transformers), of one length."""
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(folder, device="cpu", dtype="float32", batch_size=1)
    return harness.HarnessLM(folder, max_length=MAX_LENGTH, batch_size="auto"), theirs


def asked(kind, requests):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(requests)]


def answers(both, kind, requests):
    """Ours and theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [getattr(lm, kind)(asked(kind, requests), disable_tqdm=True) for lm in both]


CONTINUED = [
    ("It was the", " best"),
    ("It was the", " worst of times"),
    ("It was the", " age of wisdom, it was"),
    ("", "It was the"),
    ("", "<s>It"),
    ("it was the ", "epoch"),
    ("<s>it was</s>", " the season"),
    (TEXT, " It was"),  # longer than the model was trained for
    (TEXT + " So", " it is"),
]


def test_continuations_are_as_likely(both):
    ours, theirs = answers(both, "loglikelihood", CONTINUED)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_texts_are_as_likely_in_the_windows_of_the_harness(both):
    lengths = [1, 40, len(TEXT) // 2, len(TEXT), 3 * len(TEXT)]
    ours, theirs = answers(both, "loglikelihood_rolling", [((TEXT * 3)[:n],) for n in lengths])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_answers_are_the_same(both):
    requests = [
        (TEXT[start : start + length], options)
        for start, length in ((0, 20), (3, 20), (50, 40), (0, len(TEXT)))
        for options in (
            {"max_gen_toks": 12},
            {"until": ["\n\n", "e"], "max_new_tokens": 20, "do_sample": False},
            {"until": " ", "max_gen_toks": 8, "temperature": 0.0},
        )
    ]
    ours, theirs = answers(both, "generate_until", requests)
    assert ours == theirs
    assert len(set(ours)) > len(ours) // 2


def test_conversations_are_written_and_read_the_same(both):
    messages = [{"role": "user", "content": "It was?"}, {"role": "assistant", "content": " it "}]
    for shown, reply in ((messages[:1], True), (messages, True), (messages, False)):
        texts = [lm.apply_chat_template(shown, add_generation_prompt=reply) for lm in both]
        assert texts[0] == texts[1]
        ours, theirs = answers(both, "loglikelihood", [(texts[0], "times")])
        assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-4)
    assert both[0].chat_template(True) == TEMPLATE


def test_a_prompt_is_read_whole_unless_a_length_is_given(harness, folder):
    whole, cut = harness.HarnessLM(folder), harness.HarnessLM(folder, max_length=20)
    request = asked("loglikelihood", [(TEXT, " It was"), (TEXT[-30:], " It was")])
    (long, _), (short, _) = whole.loglikelihood(request, disable_tqdm=True)
    tokens = whole._encode(TEXT + " It was")
    count = len(tokens) - len(whole._encode(TEXT))
    nll = whole.lm.token_nll(tokens)[-count:]
    assert long == pytest.approx(-nll.sum(), abs=1e-4)
    # Of both the same tokens are read.
    assert cut.loglikelihood(request, disable_tqdm=True)[0][0] == pytest.approx(
        -whole.lm.token_nll(tokens[-21:])[-count:].sum(), abs=1e-4
    )
    assert abs(long - short) > 0.01


def test_what_is_drawn_is_drawn_again(harness, folder):
    lm = harness.HarnessLM(folder, batch_size=2)
    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    requests = asked("generate_until", [("It was the", options)] * 3)
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 3
    assert lm.generate_until(requests, disable_tqdm=True) == texts


def test_a_task_of_the_harness_is_run_under_a_policy(harness, folder):
    import datasets
    import lm_eval

    rows = [{"text": "It was the", "choices": [" best", " worst"], "answer": n % 2}
            for n in range(3)]  # fmt: skip
    task = {
        "task": "which", "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = lm_eval.simple_evaluate(
            model="lminf", model_args=f"pretrained={folder},policy=lm_infinite:window=8,sinks=2",
            tasks=[task], bootstrap_iters=0,
        )  # fmt: skip
    assert results["config"]["policy"] == "lm_infinite:window=8,sinks=2"
    assert results["results"]["which"]["acc,none"] in (1 / 3, 2 / 3)


# --- The words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ("pretrained=x", None),
        ("pretrained=x,policy=full", Full()),
        ("pretrained=x,policy=lm_infinite:window=8,sinks=2", LMInfinite(8, 2)),
        ("policy=lm_infinite:window=8,pretrained=x,sinks=2,distance=none", LMInfinite(8, 2)),
        ("pretrained=x,policy=per_layer:policies=(full,(lm_infinite:window=8,sinks=2))",
         PerLayer((Full(), LMInfinite(8, 2)))),
    ],
)  # fmt: skip
def test_a_policy_is_written_as_everywhere_though_the_harness_splits_it(harness, words, policy):
    from lm_eval._cli.utils import key_val_to_dict

    own = ("pretrained", "policy")
    given = key_val_to_dict(words)
    fields = {name: value for name, value in given.items() if name not in own}
    assert harness.parsed(given.get("policy"), fields) == policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "lm_infinite:window=8", "sinks": 2, "dtpye": "bfloat16"},
         "lm_infinite has no field 'dtpye'.* of model_args, pretrained, policy, dtype, .* are no"),
        ({"sinks": 2}, "full has no field 'sinks'"),
        ({"policy": "ful"}, "no policy is called 'ful'; did you mean 'full'"),
        ({"dtype": "float8"}, "dtype=float8: did you mean 'float"),
        ({"max_length": 1}, "max_length=1: give a number of at least 2 tokens"),
        ({"batch_size": "many"}, "--batch_size many: give a number of prompts, or auto"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(harness, folder, arguments, message):
    with pytest.raises(InputError, match=message):
        harness.HarnessLM(folder, **arguments)


def test_generation_options_are_ours_or_refused(harness):
    assert harness.generation_options({}) == (256, (), Sampling())
    assert harness.generation_options({"temperature": 0.7, "top_k": 3, "until": "x"}) == (
        256, ("x",), Sampling(0.7, top_k=3),
    )  # fmt: skip
    assert harness.generation_options({"do_sample": True}).sampling == Sampling(1.0)
    assert harness.generation_options({"num_beams": 1}).sampling == Sampling()
    with pytest.raises(InputError, match="option num_beams=4 has no counterpart here; there are"):
        harness.generation_options({"num_beams": 4})


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("loglikelihood", ("It was", ""), "and the continuation '' are .* each needs at least one"),
        ("loglikelihood", ("It", TEXT), r"continuation of \d+ tokens leaves no room for a context"),
        ("generate_until", ("It", {"max_gen_toks": 64}), "an answer of 64 tokens leaves no room"),
    ],
)
def test_requests_without_an_answer_are_refused(both, kind, request_, message):
    with pytest.raises(InputError, match=message):
        getattr(both[0], kind)(asked(kind, [request_]), disable_tqdm=True)
