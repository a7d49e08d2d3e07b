"""What a model learns of many labels from their examples in the prompt, by rounds and place.

Question   How many labels does a model tell apart from examples in its prompt, and does that depend
           on the rounds of examples, on the policy and on where the relevant example stands?
Paper      LongICLBench (Li et al. 2024, arXiv:2404.02060), for the form; labels and sentences are
           drawn, see lminf.evals.suites.many_shot
Command    python -m experiments.long_icl
Time       not measured
Expected   not measured
Short      not measured
Tiny       --config=:tiny trains a byte model at 64 tokens, which learns nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.text = None  # a file to take words from; None: the interpreter's documentation
    c.labels = 77
    c.rounds = (1, 2, 5)  # examples of each label
    c.orders = ("shuffled", "grouped")  # rounds in drawn orders; the examples of a label together
    c.documents = 12  # prompts with labels and examples of their own; each label is asked for
    c.policies = (
        "full",
        "lm_infinite:window=2048,sinks=10",
        "lm_infinite:window=1024,sinks=10",
        "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256",
    )
    if arg == "short":
        # 26 examples take 500 tokens, which one chunk of 512 holds.
        c.labels, c.rounds, c.documents = 26, (1, 2, 4), 4
        c.policies = ("full", "lm_infinite:window=512,sinks=10")
    if arg == "tiny":
        c.model = "tiny"
        c.labels, c.rounds, c.documents = 6, (1, 2), 2
        c.policies = ("full", "lm_infinite:window=64,sinks=4")
    return c
