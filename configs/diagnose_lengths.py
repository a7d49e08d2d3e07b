"""Why full attention fails past the trained length: the three factors, on a real model.

Question   Which of distance, number of attended tokens and loss of the first tokens breaks a model?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137), section 3
Command    python -m experiments.diagnose_lengths
Time       about 2 minutes on two CPU cores
Expected   past 8,192 tokens the largest logits leave the range seen in training; entropy grows
           with the tokens attended under Full and stays bounded under LM-Infinite; the first
           token's features lie far from all others
Tiny       --config=:tiny trains a byte model at 64 tokens and looks at 512: under 2 minutes
"""

from configs import base


def get_config(arg: str = ""):
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
