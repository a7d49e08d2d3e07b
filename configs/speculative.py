"""What a draft saves of the calls and of the time of a model that writes, by draft and context.

Topic      cost
Question   How many calls of the model does speculative decoding save, and is that faster, by what
           proposes the tokens and by the length of the context? Does a draft that reads what is
           retrieved of a long text help to answer questions about it, under which rule?
Paper      Leviathan et al. 2023, arXiv:2211.17192; prompt lookup (Saxena 2023); the ∞-gram (Liu et
           al. 2024, arXiv:2401.17377); RAPID (Chen et al. 2025, arXiv:2502.20330)
Data       apt install linux-doc-6.1
Command    python -m experiments.speculative
Time       not measured: for a machine with more than two cores. :short takes about 17 minutes of
           processor time on two shared cores of an Intel Xeon
Expected   not measured; :short says what to look for. Every text is that without a draft
Short      --config=:short writes 64 tokens after 3 documents of 512 and of 2,048 tokens with
           SmolLM2-135M. Prompt lookup writes 2.64 (2.03 to 3.71) tokens a call after 512 and
           2.16 (2.03 to 2.42) after 2,048, and takes less processor time than plain
           decoding in every document, 1.68 (1.21 to 2.57) and 1.37 (1.13 to 1.69) times as
           fast. What followed in the other documents, some 3,180 of the same kind, is
           seldom what the model writes, 1.28 (1.11 to 1.50) and 1.07 (1.02 to 1.11) tokens a call.
           The model under LM-Infinite with a window of 256 is right more often,
           5.41 (4.20 to 6.30) and 5.58 (4.50 to 7.00) tokens a call, but each of its own calls
           takes no less than one of the model, so that it is slower; so are the first 24 of 30
           layers, which are seldom right. Of 24 questions about 6 texts of 1,024 tokens the model
           answers 0.46 (0.28 to 0.65) at temperature 0.5, from 256 tokens that BM25 retrieves 0.29
           (0.15 to 0.49). What it proposes from these is accepted for 189 of 353 tokens by the
           standard rule, which changes no probability (0.62, 0.41 to 0.80, are answered), 201 of
           294 by RAPID's with p' (0.38, 0.20 to 0.59) and 197 of 308 by the published one (0.50,
           0.30 to 0.70): more tokens a call, and at so many questions no difference in answers
Tiny       --config=:tiny trains a byte model at 64 tokens: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.text = "/usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz"  # files, or code, …
    c.lengths = (512, 2048, 8192)  # tokens of the context
    c.documents = 8  # of each length
    c.new_tokens = 128  # written after each, greedily
    c.drafts = (
        "prompt_lookup:ngram=3",
        "ngram",  # of an index of the other documents
        "layers:8",
        "layers:24",
        "policy:lm_infinite:window=256,sinks=10",
        "policy:infllm:window=256,sinks=10,topk=4,block=64,exec_block=256",
    )
    c.draft_tokens = 7  # proposed at a time
    c.corpus_documents = 10_000  # at most, of the index
    c.answers = answers()
    if arg == "short":
        c.lengths, c.documents, c.new_tokens = (512, 2048), 3, 64
        c.drafts = (
            "prompt_lookup:ngram=3", "ngram", "layers:24", "policy:lm_infinite:window=256,sinks=10",
        )  # fmt: skip
        c.answers.length, c.answers.documents = 1024, 6
        c.answers.draft = "retrieved:tokens=256,chunk=32,question=32"
    if arg == "tiny":
        c.model, c.text = "tiny", "code"
        c.lengths, c.documents, c.new_tokens = (48,), 2, 16
        c.drafts = (
            "prompt_lookup:ngram=3", "ngram", "layers:2", "policy:lm_infinite:window=16,sinks=2",
        )  # fmt: skip
        c.draft_tokens, c.corpus_documents = 3, 40
        c.answers.length, c.answers.documents, c.answers.needles = 600, 1, 1
        c.answers.draft = "retrieved:tokens=200,chunk=40,question=80"
        c.answers.rules, c.answers.new_tokens = ("rapid:eta=10",), 4
    return c


def answers() -> ConfigDict:
    """Questions about long texts, drafted by the model itself from what is retrieved of them."""
    c = ConfigDict()
    c.length = 4096  # tokens of a prompt
    c.documents, c.needles = 12, 4  # texts, and numbers in each, all of them asked for
    c.new_tokens = 12  # written to each question
    c.temperature = 0.5
    c.draft = "retrieved:tokens=512,chunk=64,question=32"  # what is read beside the model
    c.rules = ("standard", "rapid:eta=10,residual_of=shifted", "rapid:eta=10")
    return c
