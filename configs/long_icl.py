"""What a model learns of many labels from their examples in the prompt, by rounds and place.

Topic      context
Question   How many labels does a model tell apart from examples in its prompt, and does that depend
           on the rounds of examples, on the policy and on where the relevant example stands?
Paper      LongICLBench (Li et al. 2024, arXiv:2404.02060), for the form; labels and sentences are
           drawn, see lminf.evals.suites.many_shot
Command    python -m experiments.long_icl
Time       not measured: for a machine with more than two cores. :short took 34 minutes beside
           other work on two cores of an Intel Xeon, of which it had 5 minutes of both
Expected   not measured; :short says what to look for
Short      --config=:short asks SmolLM2-135M for 26 labels in 4 prompts (chance 0.04; 104 questions
           a line). Its likeliest label is one that it prefers whatever is asked, after several
           rounds of grouped examples a late one: accuracy 0.03 to 0.05, which is chance.
           Calibrated, full attention has 0.15 after one round (0.12 to 0.19 shuffled, 0.08 to 0.19
           grouped), and more rounds show no gain: 0.12 to 0.17. LM-Infinite with a window of 512 is
           the same while the prompt fits; of grouped examples it then knows those in its window:
           0.09 (0.04 to 0.15) after two rounds, 0.07 (0.04 to 0.12) after four. The last quarter of
           several rounds of grouped examples is known best: after four, 0.30 (0.29 to 0.33) under
           full attention, against 0.04 to 0.12 in the others. Of four prompts an interval is rough,
           and has no width where all four are alike
Tiny       --config=:tiny trains a byte model at 64 tokens, which learns nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.dtype = "bfloat16"  # of weights, activations and caches
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
        c.dtype = "float32"
        c.labels, c.rounds, c.documents = 26, (1, 2, 4), 4
        c.policies = ("full", "lm_infinite:window=512,sinks=10")
    if arg == "tiny":
        c.model, c.dtype = "tiny", "float32"
        c.labels, c.rounds, c.documents = 6, (1, 2), 2
        c.policies = ("full", "lm_infinite:window=64,sinks=4")
    return c
