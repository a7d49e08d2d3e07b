"""Loss by position, far past the training length.

Topic      context
Question   Does a policy keep a model fluent at lengths beyond those of training?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137)
Command    python -m experiments.length_generalization
Time       2.5 minutes on two cores of an AMD EPYC, 5.5 on those of an Intel Xeon
Expected   nats/token by position: past 8,192 tokens Full rises, to 4.4 above re-reading in the last
           2,048; LM-Infinite stays within 0.04 of it. From 6,144 to 8,192 the text repeats passages
           that have left a window of 4,096 tokens: 0.31 above
Tiny       --config=:tiny trains a byte model at 64 tokens and reads 1,024: under 2 minutes. Full
           rises by more than 1 bit per byte. LM-Infinite does not rise, and neither does a plain
           window: such a small model has no attention sinks
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"  # a name of the table, a folder, a .gguf file, owner/name
    c.text = ""  # a UTF-8 file; "" is the interpreter's reference documentation
    c.length = 16384  # tokens read
    c.block = 2048  # tokens averaged into one row
    c.policies = (
        "full",
        "window:window=4096",
        "lm_infinite:window=4096,sinks=10",
        "lm_infinite:window=2048,sinks=10",
    )
    if arg == "tiny":
        c.model = "tiny"
        c.length, c.block = 1024, 128
        c.policies = ("full", "window:window=64", "lm_infinite:window=64,sinks=4")
    return c
