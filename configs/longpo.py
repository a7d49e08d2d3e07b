"""Long prompts learned from the answers to short ones: LongPO beside DPO and fine-tuning.

Topic      training
Question   Does a model that is good at short prompts answer long ones better after learning from
           its own short answers, and does it stay as good at short ones?
Paper      LongPO (Chen et al. 2025, arXiv:2502.13922)
Command    python -m experiments.longpo
Time       4 minutes of processor time without sft_kl, which took 22 minutes beside other work, and
           109 s for it; the same command with the same --out resumes
Expected   of prompts of 256 characters LongPO answers 0.15 more (0.08 to 0.22, 3 seeds) than the
           model before it, of 512 0.16 more, and of 64 0.02 less (0.06 less to 0.02 more). LongPO,
           DPO and fine-tuning, with or without a KL to the reference on the short prompt, cannot
           be told apart: the intervals of their differences hold 0 at every length; a right answer
           costs 0.37 nats less than after DPO at 256 (1.09 less to 0.36 more), and 0.12 more than
           after fine-tuning with the KL (0.08 less to 0.32 more). Published for Mistral-7B on
           InfiniteBench, of which this is a scaled-down form: 13.8 before, 30.0 fine-tuned, 25.6
           DPO, 39.3 LongPO
Tiny       --config=:tiny trains one seed for a few steps, which teaches nothing: seconds
Sizes      --config=:h100, :pod on one device a seed; a pod runs its seeds as commands of their own,
           with --config.seed and --config.replicates=1
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "h100", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.methods = ("none", "sft", "sft_kl", "dpo", "longpo")
    c.replicates = 3  # seeds from c.seed on
    c.model = shape(width=32, layers=2, heads=2, kv_heads=2, hidden=64)
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.length, c.batch, c.steps = 64, 16, 800  # characters of a short prompt; rows of a step
    c.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=50"
    c.tuning = ConfigDict()
    c.tuning.lengths = (128, 256)  # characters of the long prompts of each round
    c.tuning.prompts = 128  # questions of a round
    c.tuning.batch, c.tuning.steps = 8, 60  # pairs of a step, and steps of a round
    c.tuning.schedule = "cosine:peak=1e-3,floor=1e-5,warmup=10"
    c.beta = 0.1
    # Lambda, and the factor of the KL: the paper's 0.01 is for answers of hundreds of tokens.
    c.preference_scale = 1.0
    c.lengths = (64, 128, 256, 512)  # characters of the prompts that are measured
    c.instances = 256  # questions of each length
    if arg == "tiny":
        c.methods, c.replicates = ("none", "longpo"), 1
        c.model = shape(width=16, layers=1, heads=1, kv_heads=1, hidden=16)
        c.length, c.batch, c.steps = 24, 4, 8
        c.schedule = "cosine:peak=1e-2,floor=1e-4,warmup=2"
        c.tuning.lengths, c.tuning.prompts, c.tuning.steps = (32,), 8, 2
        c.tuning.batch, c.tuning.schedule = 2, "cosine:peak=1e-3,floor=1e-4,warmup=1"
        c.lengths, c.instances = (24, 32), 8
    elif arg:
        sizes = {"layers": 12, "hidden": 2048} if arg == "h100" else {"layers": 24, "hidden": 4096}
        width = sizes["hidden"] // 4
        c.model = shape(width=width, heads=width // 64, kv_heads=width // 64, **sizes)
        c.length, c.batch, c.steps = 1024, 64, 20_000
        c.schedule = "cosine:peak=1e-3,floor=1e-5,warmup=500"
        c.tuning.lengths = (4096, 8192, 16_384) if arg == "h100" else (8192, 16_384, 32_768)
        c.tuning.prompts, c.tuning.batch, c.tuning.steps = 4096, 8, 500
        c.tuning.schedule = "cosine:peak=1e-4,floor=1e-6,warmup=50"
        c.lengths = (1024, *c.tuning.lengths, 2 * c.tuning.lengths[-1])
    return c
