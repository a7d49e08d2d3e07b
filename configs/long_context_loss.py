"""Loss of windowed policies beside full attention and each other, on texts of several kinds.

Question   Do sinks and the distance limit matter, and what does a window lose, on which texts?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137)
Data       apt install linux-doc-6.1 anarchism; code and the language reference are Python's own
Command    python -m experiments.long_context_loss
Time       hours
Expected   see below
Tiny       --config=:tiny trains a byte model at 64 tokens and reads Python's own texts: 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short", "distance")
REFERENCE = ("reference",)  # the default text of other experiments, which copies itself
TEXTS = (
    "code",
    "/usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz",  # technical documents
    "/usr/share/doc/anarchism/markdown/sec*.md.gz",  # prose
)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.texts = (*REFERENCE, *TEXTS)  # kinds of text: names, folders or patterns of files
    c.documents = 12  # of each kind, of which the reference has one
    c.length = 32_768  # tokens read
    c.block = 2048  # tokens averaged into one row
    c.beyond = 4096  # tokens: a copy from farther back counts as copied
    # Claims are the difference of each entry to the one before it.
    c.policies = (
        "re-read",
        "lm_infinite:window=4096,sinks=10",
        "lambda:window=4096,sinks=10",
        "window:window=4096",
    )
    if arg == "short":  # within the training length, where reading in full is re-reading
        c.texts, c.documents, c.length, c.block, c.beyond = TEXTS, 4, 4096, 1024, 1024
        c.policies = (
            "full",
            "lm_infinite:window=1024,sinks=10",
            "lambda:window=1024,sinks=10",
            "window:window=1024",
        )
    if arg == "distance":
        c.texts, c.documents, c.length, c.beyond = TEXTS, 4, 12_288, 1024
        c.policies = ("lm_infinite:window=1024,sinks=10", "lambda:window=1024,sinks=10")
    if arg == "tiny":
        c.model, c.texts, c.documents = "tiny", (*REFERENCE, "code"), 2
        c.length, c.block, c.beyond = 256, 64, 64
        c.policies = ("re-read", "lm_infinite:window=64,sinks=4", "window:window=64")
    return c
