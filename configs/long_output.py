"""The longest output of models fine-tuned on answers up to a length.

Topic      training
Question   Does a model write no more than the longest answer that it was fine-tuned on, though it
           was trained on longer texts, and does it write less where all answers weigh the same in
           the loss instead of all their tokens?
Paper      LongWriter (Bai et al. 2024, arXiv:2408.07055)
Command    python -m experiments.long_output
Time       3 minutes of processor time for per-token weights, which took 19 minutes beside other
           work; the same command with the same --out resumes
Expected   the longest output is the longest answer trained on, 16, 32 and 64, with each of 5 seeds,
           and lengths that were trained on are met (scores 0.99 to 1.00). Asked for more a model
           writes no more: mostly less than its longest answer. Here the number that the longest
           answer ends with was always followed by an end. Per-sequence weights do not shorten these
           outputs, as LongWriter finds of long ones: trained lengths are met as well (differences
           of scores 0.00 to 0.01, intervals that hold 0), where one answer is right and each of its
           characters is learned in the end; one seed of 5 writes 104 once where it was trained up
           to 64. Longer ones score 0.08 less for 32 (0.15 less to 0.00) and are not told apart for
           16 and 64
Tiny       --config=:tiny trains one seed for a few steps, which teaches nothing: seconds
Sizes      --config=:h100, :pod on one device; a pod runs its seeds as commands of their own, with
           --config.seed and --config.replicates=1
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "h100", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.replicates = 5  # seeds from c.seed on
    c.model = shape(width=32, layers=2, heads=2, kv_heads=2, hidden=64)
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.length, c.batch, c.steps = 96, 16, 100  # characters of a text; rows of a step
    c.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=10"
    c.loss_weights = ("per_token", "per_sequence")  # what weighs the same in the fine-tuning's loss
    c.longest = (16, 32, 64)  # characters of the longest answer of a fine-tuning
    c.tuning = ConfigDict()
    c.tuning.length, c.tuning.steps = 68, 300  # room for a request and the longest answer
    c.tuning.schedule = "cosine:peak=5e-3,floor=5e-5,warmup=20"
    c.requested = (2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 92)  # characters
    c.max_new_tokens = 128
    if arg == "tiny":
        c.replicates, c.longest = 1, (2, 4)
        c.model = shape(width=16, layers=1, heads=1, kv_heads=1, hidden=16)
        c.length, c.batch, c.steps = 16, 4, 4
        c.schedule = c.tuning.schedule = "cosine:peak=1e-3,floor=1e-4,warmup=1"
        c.tuning.length, c.tuning.steps = 8, 4
        c.requested, c.max_new_tokens = (2, 8), 8
    elif arg:
        layers, hidden = (12, 2048) if arg == "h100" else (24, 4096)
        heads = hidden // 256
        c.model = shape(
            width=hidden // 4, layers=layers, heads=heads, kv_heads=heads, hidden=hidden
        )
        c.batch, c.steps, c.tuning.steps = 256, 2000, 2000
        c.schedule = "cosine:peak=1e-3,floor=1e-5,warmup=100"
        c.tuning.schedule = "cosine:peak=3e-4,floor=3e-6,warmup=100"
        c.longest = (16, 24, 32, 48, 64)
        c.replicates = 5 if arg == "h100" else 8
    return c
