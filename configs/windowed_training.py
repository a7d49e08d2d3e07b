"""Training with LM-Infinite's mask: what it reads far past the length that it was trained at.

Topic      training
Question   Does a model that is trained with LM-Infinite's mask at a length read 32 times that
           length better than one that is trained in full and reads so far in full, under
           LM-Infinite or with a rotary schedule; and what do its steps save in time and memory?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137) changes only how a model reads: training
           with its mask is our own question
Command    python -m experiments.windowed_training
Time       took 330 s of processor time, in 12 minutes beside other work on two cores of an Intel
           Xeon; the same command with the same --out resumes
Expected   in the last half of 2,048 bytes, in nats/byte over five seeds: a model trained in full at
           64 reads 3.35 in full, 3.12 with NTK-aware and 2.52 with YaRN scaling, and 1.60 to 1.62
           under LM-Infinite with no training for it; 1.60 when it re-reads. Five seeds do not tell
           training with the mask from that: paired differences to the same window without it are
           -0.009 (95 % interval -0.020 to 0.003) for a window of 32 and -0.026 (-0.055 to 0.002)
           for 16, and no smaller within the first 64 bytes. A window of 16 costs this small model
           nothing beside re-reading 64, so it cannot show what a narrow window loses. On a CPU the
           steps have 1.4 times the speed of full attention in rows of 2,048 and 0.95 times in rows
           of 64, and take 7 % and 6 % more memory; caches are 55 and 31 kB instead of 3.1 MB
Tiny       --config=:tiny trains 1 layer at 16 bytes and reads 64: under a minute
H100       --config=:h100: 1,024 and 32,768 bytes of a larger text, text=FILE; not run here
Pod        --config=:pod: 4,096 and 131,072 bytes of such a text; not run here
"""

from ml_collections import ConfigDict

from lminf.config import to_config
from lminf.configs import base
from lminf.configs.train_lm import shape
from lminf.parallel.mesh import MeshShape

VARIANTS = ("tiny", "h100", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.text = ""  # a file of text; empty: the interpreter's reference documentation
    c.held_out = 0.08  # share of the text, its end
    c.contexts = 16  # held-out rows that are read, each of `times` the trained length
    c.model = shape(width=64, layers=3, heads=2, kv_heads=2, hidden=170)
    c.batch = 32  # rows of a step
    c.steps = 200
    c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=20"
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.replicates = 5  # seeds from c.seed on: initial parameters and the rows of each step
    c.dtype, c.remat = "float32", "none"
    c.mesh, c.strategy = to_config(MeshShape()), "data"
    lengths(c, 64, times=32)
    if arg == "tiny":
        c.held_out, c.contexts, c.replicates = 0.005, 4, 2
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=64)
        c.batch, c.steps = 8, 10
        c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=2"
        lengths(c, 16, times=4)
        c.policies, c.read_scalings = c.policies[:2], c.read_scalings[:1]
    elif arg:
        large(c, arg)
    return c


def lengths(c: ConfigDict, length: int, *, times: int) -> None:
    """Rows of `length` to train on, reading `times` as far; windows of a half and a quarter."""
    half, quarter = (f"lm_infinite:window={length // part},sinks=4" for part in (2, 4))
    c.length, c.times = length, times
    c.policies = ("full", half, quarter)  # trained and read with
    # What the model that is trained in full is read with beside those: as many tokens as it was
    # trained to see, and schedules for as many as there are.
    c.read_policies = (f"lm_infinite:window={length},sinks=4",)
    c.read_scalings = (f"ntk:alpha={times}", f"yarn:factor={times},trained_length={length}")


def large(c: ConfigDict, size: str) -> None:
    """Shapes for accelerators, in bfloat16."""
    c.dtype, c.remat, c.replicates, c.held_out = "bfloat16", "full", 3, 0.02
    c.contexts = 64
    c.schedule = "cosine:peak=6e-4,floor=6e-5,warmup=200"
    if size == "h100":
        c.model = shape(width=768, layers=12, heads=12, kv_heads=4, hidden=2048)
        c.batch, c.steps = 64, 4000
        lengths(c, 1024, times=32)
    else:
        c.model = shape(width=2048, layers=16, heads=16, kv_heads=8, hidden=8192)
        c.batch, c.steps = 1024, 4000
        c.mesh.data, c.mesh.fsdp, c.strategy = 1, -1, "zero3"
        lengths(c, 4096, times=32)
