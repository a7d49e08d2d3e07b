"""Passkey retrieval at prompt lengths below and past the training length.

Question   Up to which prompt length, and at which depths, does a model retrieve a passkey?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137)
Command    python -m experiments.passkey
Time       an hour on two CPU cores, mostly prefill of the long prompts; the same command with the
           same --out resumes
Expected   Full answers up to about 8,192 tokens, its training length, and not at 10,000;
           LM-Infinite does not answer if the key has left its window. Two prompts per cell are few:
           at 8,000 tokens neither finds the late key, at 10,000 LM-Infinite finds it twice
Tiny       --config=:tiny trains a byte model at 64 tokens, which retrieves nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"  # prompted raw, not through its chat template
    c.generator = "landmark"  # or lm_infinite: lminf.evals.passkey says how they differ
    c.lengths = (600, 1700, 3300, 8000, 10000)  # tokens of the whole prompt
    c.prompts = (10, 10, 10, 6, 6)  # of each length, at each depth
    c.depths = (0.1, 0.9)  # share of the filler that stands before the key
    c.policies = (
        "full",
        "lm_infinite:window=4096,sinks=10",
        "window:window=4096",
    )
    if arg == "tiny":
        c.model = "tiny"
        c.lengths, c.prompts = (400, 700), (2, 2)
        c.policies = ("full", "lm_infinite:window=64,sinks=4", "window:window=64")
    return c
