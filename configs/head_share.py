"""What the embedding and the head cost of a training step, by their size and how it is divided.

Topic      cost
Question   What share of a step's time and of a device's memory does the vocabulary take, by its
           size, under data, fsdp and tensor parallelism, and in pipelines that leave it on the
           first and last stages or divide it over all?
Paper      Vocabulary parallelism (Yeung et al. 2024, arXiv:2411.05288)
Command    python -m experiments.head_share
Time       40 s on two CPU cores
Expected   by the planner's model of eight A100s, 262,144 tokens take 13 % of the step time under
           data parallelism, fsdp and a pipeline that divides the vocabulary over all stages, and
           60 % where the last stage has the head, because the others wait for it
Tiny       --config=:tiny has two vocabularies and compiles for two devices: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.vocab_sizes = (32_768, 65_536, 131_072, 262_144)  # tokens
    c.planned = ConfigDict({
        "devices": "a100x8",  # as `lminf plan --devices` takes them
        # 3.6 billion parameters beside the vocabulary.
        "model": shape(width=3072, layers=32, heads=24, kv_heads=24, hidden=8192),
        "rows": 128,  # of a step, computed one at a time
        "length": 4096,  # tokens of a row
        "remat": "full",
        "efficiency": 0.6,  # share of the peak that products of matrices reach; an assumption
    })  # fmt: skip
    c.compiled = ConfigDict({
        "devices": 4,  # CPU devices
        "vocab_sizes": (4096, 8192),  # tokens; the second less the first is what counts
        "model": shape(width=256, layers=8, heads=8, kv_heads=8, hidden=768),
        "rows": 16,
        "length": 128,
        "remat": "full",
    })  # fmt: skip
    c.planned.model.tied = c.compiled.model.tied = False
    if arg == "tiny":
        c.vocab_sizes = (4096, 16_384)
        c.compiled.devices, c.compiled.rows, c.compiled.length = 2, 4, 16
        c.compiled.vocab_sizes = (256, 512)
        c.compiled.model = shape(width=32, layers=2, heads=2, kv_heads=2, hidden=64)
        c.compiled.model.tied = False
    return c
