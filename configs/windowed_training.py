"""Training with LM-Infinite's mask: what it reads far past the length that it was trained at.

Question   Does a model that is trained with LM-Infinite's mask at a length read 32 times that
           length better than one that is trained in full and reads so far in full, under
           LM-Infinite or with a rotary schedule; and what do its steps save in time and memory?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137) changes only how a model reads: training
           with its mask is our own question
Command    python -m experiments.windowed_training
Time       TIME
Expected   EXPECTED
Tiny       --config=:tiny trains 1 layer at 16 bytes and reads 64: under a minute
H100       --config=:h100: 1,024 and 32,768 bytes on one GPU; give it a larger text, text=FILE
Pod        --config=:pod: 4,096 and 131,072 bytes; text=FILE. Not run here
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
