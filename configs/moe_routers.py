"""Mixtures of experts that differ in their router, at equal active parameters.

Topic      training
Question   Which router gives a mixture of experts the lowest loss at equal active parameters, how
           evenly does it load the experts, and what is a loss worth whose router saw the future?
Paper      expert choice (Zhou et al. 2022, arXiv:2202.09368), hash layers (Roller et al. 2021,
           arXiv:2106.04426), fine-grained and shared experts (DeepSeekMoE, arXiv:2401.06066),
           balancing without a loss (Wang et al. 2024, arXiv:2408.15664), sparse upcycling
           (Komatsuzaki et al. 2023, arXiv:2212.05055)
Command    python -m experiments.moe_routers
Time       took 520 s in three calls, beside other work on two cores of an Intel Xeon; the same
           command with the same --out resumes
Expected   in nats/byte above token choice after 300 steps, paired over four seeds, 95 % intervals,
           each model read as a text is written: hash -0.131 (-0.176 to -0.087); upcycling 0.031
           (0.005 to 0.057); balancing without a loss, expert choice, fine-grained experts and a
           dense model of as many active parameters are not told from it. So short a training of
           so small a model favours what needs no router to learn; it says nothing about long
           ones. The busiest expert reads 1.8 times its even share under token choice, 1.6 times
           without the loss, 1.7 times under hash, exactly its share where experts choose; there
           no choice is dropped and 0.7 % of tokens are read by none. Expert choice sees the future,
           so its loss as trained (1.816) is no loss of a language model; here it is no lower than
           what its weights give by token choice (1.773): 300 steps did not learn to use the leak
Tiny       --config=:tiny: 1 layer, 4 experts, 8 steps, two seeds: under a minute
Pod        --config=:pod: 64 experts of a larger model on a text of one's own (text=FILE), in
           float32 on one device; not run here
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    # Routers; and `dense`, an MLP of as many active channels; `fine_grained`, token choice among
    # smaller experts and shared ones; `upcycled`, half of the steps as a dense model of one
    # expert's width, whose copies the experts then are.
    c.models = (
        "token_choice", "loss_free", "hash", "expert_choice", "fine_grained", "upcycled", "dense",
    )  # fmt: skip
    c.text = ""  # a file of text; empty: the interpreter's reference documentation
    c.held_out = 0.08  # share of the text, its end
    c.contexts = 192  # held-out rows that are read
    c.model = shape(width=64, layers=2, heads=2, kv_heads=2, hidden=128)  # hidden: active channels
    c.experts, c.top_k = 8, 2
    c.pieces, c.shared = 4, 1  # of an expert of `fine_grained`; of those, how many read every token
    c.capacity_factor = 1.25  # tokens that an expert reads in training, by its even share
    c.length, c.batch = 64, 16  # bytes of a row, and rows of a step
    c.steps = 300
    c.replicates = 4  # seeds from c.seed on: initial parameters and order of the rows
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=30"
    if arg == "tiny":
        c.held_out, c.contexts = 0.005, 8
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=32)
        c.experts, c.pieces, c.batch, c.steps, c.replicates = 4, 2, 4, 8, 2
        c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=2"
    elif arg == "pod":
        c.model = shape(width=768, layers=12, heads=12, kv_heads=12, hidden=2048)
        c.experts, c.length, c.batch, c.steps, c.contexts = 64, 1024, 64, 5000, 1024
        c.schedule = "cosine:peak=1e-3,floor=1e-4,warmup=500"
    return c
