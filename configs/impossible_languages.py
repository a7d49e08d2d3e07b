"""Languages that no human speaks: how hard they are to learn, at equal steps.

Topic      data
Question   Is a language harder to learn the less its word order follows its sentences, and where do
           models of hopped markers keep the number that a marker tells?
Paper      Mission: Impossible Language Models (Kallini et al. 2024, arXiv:2401.06416)
Command    python -m experiments.impossible_languages
Time       took 430 s of processor time beside other work; 4 minutes on two idle cores; the same
           command with the same --out resumes
Expected   shuffles are harder the wider they reach: 12.5 for the control, 20, 30 and 54 in windows
           of 3, 5 and 10 words, 75 for whole sentences, where 300 steps do not tell a permutation
           for each length from one for each sentence. Reversal costs nothing at this scale; hops
           cost 5 % of perplexity and their markers are less well predicted. Where no_hop's states
           are exchanged behind the first layer, that of the subject flips 1.00, 0.48 and 1.00 of
           the predicted markers (3 seeds) and that of the verb 0.00, 0.51 and 0.00; behind the last
           layer the verb's, which predicts the marker, flips all. In token_hop and word_hop, whose
           markers are predicted four tokens or words later, exchanged embeddings of the subject
           flip 0.36 (0.05 to 0.81) and 0.39 (0.21 to 0.56), and behind the first layer no one
           state flips more than 0.31
Tiny       --config=:tiny: three languages, 20 steps, under a minute
Pod        --config=:pod: the paper's shape, batch and steps, on 2 M generated sentences or a tagged
           text (text=FILE); --config=:h100 an eighth of the batch. Not run here
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "h100", "pod")
# Each family beside its control.
FAMILIES = (
    "control", "local:window=3", "local:window=5", "local:window=10", "even_odd",
    "deterministic:seed=21", "nondeterministic", "marked", "partial_reverse", "full_reverse",
    "no_hop", "token_hop", "word_hop",
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.languages = FAMILIES
    c.text = ""  # a tagged text, each word as text/tag/lemma; empty: sentences of a small grammar
    c.sentences = 12_000  # of that grammar: about 0.9 MB
    c.test_sentences = 500  # sentences that perplexity is measured on
    c.model = shape(width=64, layers=2, heads=2, kv_heads=2, hidden=170)
    c.length, c.batch = 64, 16  # tokens of a row, and rows of a step
    c.steps, c.evaluate_every = 300, 100
    c.replicates = 3  # seeds from c.seed on: initial parameters and order of the rows
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=30"
    c.dtype, c.remat, c.grad_accum_steps = "float32", "none", 1
    if arg == "tiny":
        c.languages = ("control", "nondeterministic", "word_hop")
        c.sentences, c.test_sentences = 600, 50
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=64)
        c.steps, c.evaluate_every, c.batch, c.replicates = 20, 10, 4, 2
        c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=2"
    elif arg:
        c.sentences, c.test_sentences = 2_000_000, 10_000
        c.model = shape(width=768, layers=12, heads=12, kv_heads=12, hidden=2048)
        c.length, c.batch, c.replicates = 1024, 512, 5
        c.steps, c.dtype, c.remat, c.grad_accum_steps = 3000, "bfloat16", "full", 64
        c.schedule = "cosine:peak=6e-4,floor=6e-5,warmup=300"
        if arg == "h100":
            c.sentences, c.batch, c.grad_accum_steps = 500_000, 64, 8
    return c
