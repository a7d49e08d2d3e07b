"""What of a long context survives a budget: ways to reduce it, at equal numbers of tokens.

Topic      context
Question   Of the facts of a context that is reduced to a budget of tokens, how many are still
           answered: by truncation, retrieved chunks, deleted words, chosen segments, recalled
           turns, summaries, embeddings in the place of tokens, a bank of keys and values, smaller
           caches?
Paper      TCRA-LLM (arXiv:2310.15556), SCM (arXiv:2304.13343), XL3M (arXiv:2405.17755), Extensible
           Tokenization (arXiv:2401.07793), LongMem (arXiv:2306.07174), beside SnapKV, H2O and
           LM-Infinite
Command    python -m experiments.context_budget
Time       not measured: for a machine with more than two cores. :short takes about 15 minutes
           of processor time on two shared cores of an Intel Xeon
Expected   not measured; :short says what to look for
Short      --config=:short asks SmolLM2-135M 16 questions about 4 texts of 1,024 tokens. It answers
           0.81 (0.57 to 0.93) of them from the whole text, and from 256 tokens 0.50 (0.28 to 0.72)
           by BM25, 0.38 (0.18 to 0.62) by segments, 0.25 (0.10 to 0.49) by SCM, 0.19 (0.05 to
           0.49) by cutting the middle, 0.06 (0.01 to 0.29) by deleted words, 0.12 (0.02 to 0.50)
           under H2O and none (0.00 to 0.49) under SnapKV. Of facts among 128 characters, models of
           two layers answer 0.95 (0.91 to 0.98) of 384 questions, 3 seeds, from all of them, and
           from 33 under H2O 0.47 (0.40 to 0.55), under LM-Infinite 0.39 (0.32 to 0.46) and by
           cutting the middle 0.35 (0.32 to 0.38). From the summaries of models that are trained
           further for 600 steps to write the eight facts and nothing else they answer 0.67, 0.40
           and 0.24 by seed, 0.44 (-0.10 to 0.98), and as many from 9, where every other method
           answers at most 0.20: they are trained to keep what may be asked. Extensible
           Tokenization and LongMem are trained for 300 steps there, which is too few: 0.16 (0.12
           to 0.20) and 0.19 (-0.07 to 0.46), where guesses answer an eighth
Tiny       --config=:tiny asks a byte model at 64 tokens, which answers nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "short")
TRUNCATIONS = ("truncation of the end", "truncation of the start", "truncation of the middle")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.dtype = "bfloat16"  # of weights, activations and caches
    c.length = 2048  # tokens of a prompt that is not reduced
    c.needles, c.instances = 4, 200  # needles of a text, each asked for; questions in all
    c.budgets = (256, 512, 1024)  # tokens of the reduced context and the question
    c.methods = (
        *TRUNCATIONS, "bm25", "semantic deletion", "segments", "scm", "summary",
    )  # fmt: skip
    # {c} is the budget (tokens), {w} the same less the sinks, {h} a quarter of it.
    c.policies = (
        "snapkv:capacity={c}",
        "h2o:capacity={c},recent={h},turn={h}",
        "lm_infinite:window={w},sinks=4",
    )
    c.words = 32  # of a chunk of BM25, and of a turn of SCM
    c.span, c.rounds = 24, 8  # words that are embedded together; rounds of deletion
    c.embedding_layers = 2  # of the model, that embed texts
    c.segment_len = 96  # tokens
    c.recalled = 6  # turns
    c.lookups = lookups()
    if arg == "short":
        # A summary of 100 words takes longer to write than all else to read.
        c.length, c.instances, c.budgets = 1024, 16, (256,)
        c.methods = (TRUNCATIONS[2], "bm25", "semantic deletion", "scm", "segments")
        c.policies = ("snapkv:capacity={c}", "h2o:capacity={c},recent={h},turn={h}")
        c.rounds, c.recalled = 2, 4
        c.lookups.budgets, c.lookups.tuning.steps = (9, 33), 300
        c.lookups.summary.steps = 600
    if arg == "tiny":
        c.model, c.dtype, c.length, c.instances, c.budgets = "tiny", "float32", 600, 4, (300,)
        c.methods = ("truncation of the end", "bm25", "semantic deletion", "scm")
        c.policies = ("lm_infinite:window=64,sinks=4",)
        c.rounds = 1
        c.lookups.replicates, c.lookups.length, c.lookups.instances = 1, 32, 4
        c.lookups.model = shape(width=16, layers=2, heads=1, kv_heads=1, hidden=16)
        c.lookups.trained_length, c.lookups.batch, c.lookups.steps = 24, 4, 8
        c.lookups.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=2"
        c.lookups.tuning.steps, c.lookups.tuning.batch = 2, 2
        c.lookups.tuning.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=1"
        c.lookups.budgets, c.lookups.chunk, c.lookups.ratios = (9,), 16, (4,)
        c.lookups.summary.batch, c.lookups.summary.steps = 4, 8
        c.lookups.summary.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=2"
        c.lookups.methods = (
            "nothing", TRUNCATIONS[2], "trained summary", "extensible tokenization", "longmem",
        )  # fmt: skip
        c.lookups.policies = ("lm_infinite:window={w},sinks=4",)
    return c


def lookups() -> ConfigDict:
    """The world of facts among characters, and the small models that are trained on it."""
    c = ConfigDict()
    c.replicates = 3  # seeds
    c.model = shape(width=32, layers=2, heads=2, kv_heads=2, hidden=64)
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.trained_length, c.batch, c.steps = 64, 16, 800  # characters of a row, rows of a step
    c.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=50"
    c.length = 128  # characters of a context
    c.instances = 128  # questions
    c.budgets = (9, 17, 33)  # characters: of the context 8, 16, 32, and the question
    c.methods = (
        "nothing", *TRUNCATIONS, "trained summary", "extensible tokenization", "longmem",
    )  # fmt: skip
    c.policies = ("h2o:capacity={c},recent={h},turn={h}", "lm_infinite:window={w},sinks=4")
    c.chunk = 32  # characters that the first layers read at once, and of a segment of LongMem
    c.layers, c.ratios = 2, (4, 8, 16)  # of Extensible Tokenization: copied, and drawn
    c.retrieved_together = 4  # tokens of a chunk of LongMem's bank
    c.tuning = ConfigDict()  # of what is trained beside the model
    c.tuning.batch, c.tuning.steps = 16, 4000
    c.tuning.schedule = "cosine:peak=3e-3,floor=1e-4,warmup=20"
    c.summary = ConfigDict()  # of the model that is trained further to write summaries
    c.summary.lengths = (4, 8)  # characters, rising
    c.summary.batch, c.summary.steps = 16, 1500
    c.summary.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=50"
    return c
