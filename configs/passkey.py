"""Passkey retrieval at prompt lengths below and past the training length.

Topic      context
Question   Up to which prompt length, and at which depths, does a model retrieve a passkey?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137)
Command    python -m experiments.passkey
Time       an hour on two CPU cores, mostly prefill of the long prompts; the same command with the
           same --out resumes
Expected   Full finds 20 of 20 keys up to 3,300 tokens, 5 of 12 at 8,000, just below its training
           length, and none of 12 at 10,000; LM-Infinite none of 12 that have left its window, and
           of those inside it 20 of 20 up to 3,300 tokens, none of 6 at 8,000 and 5 of 6 at 10,000.
           The prompts of a cell differ in their keys alone, so a cell shows what one text does
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
