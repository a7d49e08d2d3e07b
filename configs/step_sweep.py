"""Learning rate and batch, measured: the bowl of a small model, and the laws' points in it.

Question   Which learning rate and batch give the least loss, and do the laws find them?
Paper      Step law (Li et al. 2025, arXiv:2503.04715)
Command    lminf sweep step --config=step_sweep:laptop
Time       :laptop is meant for two CPU cores; its time is not measured yet
Expected   a bowl whose minimum is interior in the learning rate; best losses at small batches
Tiny       --config=:tiny: two batches, a minute
Pod        --config=:pod: the shapes, tokens and grid of the paper's dense models
"""

from ml_collections import ConfigDict

from configs import base
from lminf.run.sweep import chain, cross, grid, zipped

VARIANTS = ("tiny", "laptop", "h100", "pod")

# h, d_ff, heads, layers of the paper's dense groups, and the D (tokens) of each.
PUBLISHED = (
    ((960, 9368, 15, 7), (4e9, 11.4e9, 20e9, 100e9)),
    ((1024, 9552, 16, 8), (5e9, 14.2e9, 25e9, 80e9)),
    ((1280, 9472, 10, 10), (8e9, 22.7e9, 40e9, 50e9)),
    ((1280, 9048, 10, 13), (10e9, 28.4e9, 50e9)),
    ((2048, 8192, 16, 16), (20e9, 56.9e9)),
)


def get_config(arg: str = ""):
    c = base.get_config(arg, variants=VARIANTS)
    c.data = ConfigDict()
    c.data.corpus = "library"  # or prose: the docstrings and the reference alone
    c.data.vocab = 512  # byte-level BPE, trained on the text
    c.data.length = 64  # tokens of a row
    c.data.batch = 8  # rows of a step
    c.model = base.small_shape()
    c.tokens = 131_072  # D: every token is seen once
    c.rates = tuple(5e-4 * 2**i for i in range(7))  # peaks, trained side by side
    c.replicates = 1  # seeds from c.seed on, trained side by side
    c.schedule = "cosine:peak=1,floor=1e-5,warmup=20"  # the law's runs too end at 1e-5
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.clip = 1.0
    if arg == "tiny":
        c.tokens, c.rates = 16_384, (2e-3, 8e-3)
    elif arg in ("h100", "pod"):
        c.data.vocab = 65_536 if arg == "pod" else 32_768
        c.data.length = 2048
        c.rates = tuple(2.0**-i for i in (12, 11.5, 11, 10.5, 10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5))
        c.schedule = "cosine:peak=1,floor=1e-5,warmup=2000"
    return c


def get_sweep(c, arg: str = ""):
    if arg == "pod":
        return published()
    if arg == "h100":
        shapes = zipped({"model.width": (512, 768), "model.num_layers": (8, 12),
                         "model.num_heads": (8, 12), "model.num_kv_heads": (8, 12),
                         "model.hidden_dim": (1365, 2048)})  # fmt: skip
        return cross(shapes, grid({"tokens": (500_000_000, 2_000_000_000),
                                   "data.batch": (16, 32, 64, 128, 256)}))  # fmt: skip
    if arg == "tiny":
        return grid({"data.batch": (2, 8)})
    batches = grid({"data.batch": (2, 4, 8, 16, 32)})
    narrow = {"model.width": 48, "model.num_layers": 4, "model.num_heads": 3,
              "model.num_kv_heads": 3, "model.hidden_dim": 106}  # fmt: skip
    at_the_optimum = grid({"data.batch": (4,)})
    return chain(
        batches,
        cross(grid({"seed": (1,)}), at_the_optimum),
        cross(grid({"tokens": (262_144,)}), batches),
        cross((narrow,), at_the_optimum),
        cross(grid({"data.corpus": ("prose",)}), at_the_optimum),
    )


def published():
    cells = []
    for (width, hidden, heads, layers), budgets in PUBLISHED:
        shape = {"model.width": width, "model.hidden_dim": hidden, "model.num_heads": heads,
                 "model.num_kv_heads": heads, "model.num_layers": layers}  # fmt: skip
        batches = (32, 64, 128, 192, 256, 352, 512, 736, 1024, 2048)
        settings = grid({"tokens": tuple(map(int, budgets)), "data.batch": batches})
        cells.append(cross((shape,), settings))
    return chain(*cells)
