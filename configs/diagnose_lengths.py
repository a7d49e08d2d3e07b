"""Why full attention fails past the training length: three factors, on a real model.

Topic      context
Question   Which of distance, number of attended tokens and loss of the first tokens breaks a model?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137), section 3
Command    python -m experiments.diagnose_lengths
Time       half a minute on two CPU cores
Expected   the mean entropy of attention jumps past 8,192 tokens under Full, to 5.5 nats at 12,288,
           and stays at 4.2 under LM-Infinite; the features of the first token lie far from all
           others, by a factor of 107 in layer 19. The largest logits stay close to their range in
           training: not all three factors of the paper appear in this model
Tiny       --config=:tiny trains a byte model at 64 tokens and reads 512: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"  # a name of the table, a folder, a .gguf file, owner/name
    c.text = ""  # a UTF-8 file; "" is the interpreter's reference documentation
    c.length = 12288  # tokens read, under full attention
    c.layers = (0, 9, 19, 29)  # looked at
    c.queries = 48  # positions looked at, spread evenly by their logarithm
    c.policies = ("full", "lm_infinite:window=4096,sinks=10")  # whose entropy is compared
    if arg == "tiny":
        c.model = "tiny"
        c.length, c.layers, c.queries = 512, (0, 3), 24
        c.policies = ("full", "lm_infinite:window=64,sinks=4")
    return c
