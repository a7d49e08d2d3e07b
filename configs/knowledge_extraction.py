"""Biographies written once or in many ways, and what a model of them can then be asked.

Topic      data
Question   Does writing about people in many ways make what a model knows of them extractable?
Paper      Physics of Language Models 3.1 (Allen-Zhu and Li 2023, arXiv:2309.14316)
Command    python -m experiments.knowledge_extraction
Time       took 430 s of processor time beside other work; 4 minutes on two idle cores; the same
           command with the same --out resumes
Expected   all memorise the biographies (87 to 100 %), but test people's questions are answered by
           chance from one biography each (9 % right, three seeds 6 to 11), and better from five in
           random order: 20 % (14 to 29), with full names 42 % (25 to 55). The probes, which only
           50 people train, do not show it: the Q-probe stays at chance, 10 %
Tiny       --config=:tiny: 16 people, 20 steps, under a minute
Pod        --config=:pod: the paper's 100,000 people and shape, on one device; --config=:h100 10,000
           people. Not run here
"""

from ml_collections import ConfigDict

from lminf.config import to_config
from lminf.configs import base
from lminf.configs.train_lm import shape
from lminf.data.worlds.bios import Sizes

VARIANTS = ("tiny", "h100", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.people = 100  # half of them are asked about in training, the others at the end
    c.sizes = to_config(Sizes(first=20, middle=20, last=200, years=10, cities=10, universities=10,
                              majors=10, employers=20))  # fmt: skip
    c.augmentations = ("single", "multi5+permute", "multi5+permute+fullname")
    c.question_share = 0.25  # of the rows: questions and answers of the train people
    c.model = shape(width=64, layers=2, heads=2, kv_heads=2, hidden=170)
    c.length, c.batch = 128, 8  # tokens of a row, and rows of a step
    c.steps = 800
    c.replicates = 3  # seeds from c.seed on: people, their biographies and initial parameters
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=50"
    c.dtype, c.remat, c.grad_accum_steps = "float32", "none", 1
    c.probe = ConfigDict()
    c.probe.steps, c.probe.batch, c.probe.rate = 60, 50, 1e-2  # batch: people of a step
    c.probe.seed = 0
    if arg == "tiny":
        c.people, c.augmentations = 16, ("single", "multi2+permute")
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=64)
        c.steps, c.batch, c.replicates, c.probe.steps = 20, 2, 2, 5
        c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=2"
    elif arg:
        c.people = 100_000 if arg == "pod" else 10_000
        c.sizes, c.question_share = to_config(Sizes()), 0.8
        c.model = shape(width=768, layers=12, heads=12, kv_heads=12, hidden=2048)
        c.length, c.batch = 512, 96
        c.steps = 80_000 if arg == "pod" else 20_000
        c.dtype, c.remat, c.grad_accum_steps = "bfloat16", "full", 4
        c.schedule = "cosine:peak=1e-3,floor=1e-4,warmup=1000"
        c.probe.steps, c.probe.batch, c.probe.rate = 30_000, 50, 1e-3
    return c
