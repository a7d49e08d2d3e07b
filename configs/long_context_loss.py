"""Loss of windowed policies beside full attention and each other, on texts of several kinds.

Topic      context
Question   Do sinks and the distance limit matter, and what does a window lose, on which texts?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137)
Data       apt install linux-doc-6.1 anarchism; code and the language reference are Python's own
Command    python -m experiments.long_context_loss
Time       not measured as a whole: for a machine with more than two cores. The same command with
           the same --out resumes
Expected   sinks are worth 0.5 to 0.6 nats/token once a window has moved on. The distance limit is
           worth nothing up to the training length, and matters soon after it
Short      --config=:short reads 4,096 tokens of 6 documents of each kind, full attention beside
           windows of 1,024: 30 s for a window and 41 s for Full on two cores of an Intel Xeon
           beside other work. From 1,024 on LM-Infinite is 0.038 to 0.090 nats/token above Full
           (0.023 to 0.116, n = 18), and a window without sinks 0.526 to 0.588 above that (0.485 to
           0.638)
Distance   --config=:distance reads 12,288 tokens of 4 documents of each kind with and without the
           limit, 46 s for one. From 10,240 on Lambda is 0.076 (0.061 to 0.095, n = 12) nats/token
           above LM-Infinite; before, within 0.007 of it on average
Copies     --config=:copies reads 8,192 tokens of the reference, in two minutes. From
           6,144 to 8,192 a window of 4,096 loses 0.313 nats/token, and 0.035 on the tokens that are
           not copied from farther back, which are 87 % of them
Tiny       --config=:tiny trains a byte model at 64 tokens and reads Python's own texts: 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short", "distance", "copies")
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
        c.texts, c.documents, c.length, c.block, c.beyond = TEXTS, 6, 4096, 1024, 1024
        c.policies = (
            "full",
            "lm_infinite:window=1024,sinks=10",
            "lambda:window=1024,sinks=10",
            "window:window=1024",
        )
    if arg == "distance":
        c.texts, c.documents, c.length, c.beyond = TEXTS, 4, 12_288, 1024
        c.policies = ("lm_infinite:window=1024,sinks=10", "lambda:window=1024,sinks=10")
    if arg == "copies":  # up to the training length, where reading in full is re-reading
        c.texts, c.documents, c.length = REFERENCE, 1, 8192
        c.policies = ("full", "lm_infinite:window=4096,sinks=10")
    if arg == "tiny":
        c.model, c.texts, c.documents = "tiny", (*REFERENCE, "code"), 2
        c.length, c.block, c.beyond = 256, 64, 64
        c.policies = ("re-read", "lm_infinite:window=64,sinks=4", "window:window=64")
    return c
