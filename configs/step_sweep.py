"""Learning rate and batch size of a small model, measured, with the predictions of the laws.

Topic      scaling
Question   Which learning rate and batch size give the least loss, and do the laws predict them?
Paper      Step law (Li et al. 2025, arXiv:2503.04715)
Command    lminf sweep step --config=step_sweep:laptop
Time       :laptop took 1,010 s of processor time beside other work; 9 minutes on two idle cores
Expected   minima that are interior in the learning rate and in the batch size, at a larger batch
           after 524,288 tokens of training than after 131,072
Tiny       --config=:tiny: two batches, a minute
Pod        --config=:pod: the shapes, tokens and grids of the paper's dense and MoE models
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.run.sweep import Overrides, chain, cross, grid, zipped

VARIANTS = ("tiny", "laptop", "h100", "pod")

# h, d_ff, heads, layers of the paper's dense groups, and the D (tokens) of each.
PUBLISHED = (
    ((960, 9368, 15, 7), (4e9, 11.4e9, 20e9, 100e9)),
    ((1024, 9552, 16, 8), (5e9, 14.2e9, 25e9, 80e9)),
    ((1280, 9472, 10, 10), (8e9, 22.7e9, 40e9, 50e9)),
    ((1280, 9048, 10, 13), (10e9, 28.4e9, 50e9)),
    ((2048, 8192, 16, 16), (20e9, 56.9e9)),
)

# One shape, its first layer dense: experts of a token, experts, their d_ff, the shared one's d_ff.
MIXED_SHAPE = (1408, 3904, 11, 16)
MIXTURES = ((1, 89, 352, 352), (2, 88, 352, 704), (1, 8, 3528, 3528), (3, 8, 2888, 8664))
MIXED_TOKENS = (2_000_000_000, 4_000_000_000, 8_000_000_000, 20_000_000_000)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.data = ConfigDict()
    c.data.corpus = "library"  # or prose: the docstrings and the reference alone
    c.data.vocab = 512  # byte-level BPE, trained on the text
    c.data.length = 32  # tokens of a row: the best batches are of few tokens
    c.data.batch = 8  # rows of a step
    c.model = base.small_shape()
    c.experts = base.experts(hidden=85)
    c.tokens = 131_072  # D: every token is seen once
    c.rates = tuple(1e-3 * 2**i for i in range(5))  # peaks, trained side by side
    c.replicates = 2  # seeds from c.seed on, trained side by side
    c.schedule = "cosine:peak=1,floor=1e-5,warmup=0"  # the law's runs too end at 1e-5
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.clip = 1.0
    c.warmup = 0.05  # share of the steps, where the schedule says 0 steps
    if arg == "tiny":
        c.tokens, c.rates, c.replicates = 16_384, (2e-3, 8e-3), 1
    elif arg in ("h100", "pod"):
        c.data.vocab = 65_536 if arg == "pod" else 32_768
        c.data.length, c.replicates = 2048, 1
        c.rates = tuple(2.0**-i for i in (12, 11.5, 11, 10.5, 10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5))
        c.schedule = "cosine:peak=1,floor=1e-5,warmup=2000"
        c.warmup = 0.0
    return c


def get_sweep(c: ConfigDict, arg: str = "") -> tuple[Overrides, ...]:
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
    # A window of rates for each batch: the best rate grows as the root of the batch.
    low, high = (tuple(1e-3 * 2**i for i in span) for span in (range(4), range(1, 5)))
    short = zipped({"data.batch": (1, 2, 4, 8, 16), "rates": (low, low, high, high, high)})
    # Four times the tokens, where the best batch is larger.
    long = zipped({"data.batch": (2, 4, 8, 16, 32),
                   "rates": (low[:3], low[1:], low[1:], high[1:], high[1:])})  # fmt: skip
    # One change at a time: a deeper shape of as many parameters, prose in place of code, and
    # experts of which a token uses as many.
    deeper = {"model.width": 48, "model.num_layers": 4, "model.hidden_dim": 106}
    changes = chain((deeper,), grid({"data.corpus": ("prose",)}), grid({"experts.count": (4,)}))
    return chain(
        short,
        cross(({"tokens": 524_288},), long),
        cross(changes, ({"data.batch": 4, "rates": high},)),
    )


def published() -> tuple[Overrides, ...]:
    """Dense and mixed shapes; the mixtures have a grid of their own."""
    cells = []
    for (width, hidden, heads, layers), budgets in PUBLISHED:
        shape = {"model.width": width, "model.hidden_dim": hidden, "model.num_heads": heads,
                 "model.num_kv_heads": heads, "model.num_layers": layers}  # fmt: skip
        batches = (32, 64, 128, 192, 256, 352, 512, 736, 1024, 2048)
        settings = grid({"tokens": tuple(map(int, budgets)), "data.batch": batches})
        cells.append(cross((shape,), settings))
    width, hidden, heads, layers = MIXED_SHAPE
    shape = {"model.width": width, "model.hidden_dim": hidden, "model.num_heads": heads,
             "model.num_kv_heads": heads, "model.num_layers": layers,
             "experts.dense_layers": 1, "rates": tuple(2.0 ** (-i / 2) for i in range(25, 16, -1)),
    }  # fmt: skip
    mixtures = zipped(dict(zip(
        ("experts.top_k", "experts.count", "experts.hidden_dim", "experts.shared_dim"),
        zip(*MIXTURES, strict=True), strict=True,
    )))  # fmt: skip
    settings = grid({"tokens": MIXED_TOKENS, "data.batch": (32, 64, 128, 256, 512)})
    return chain(*cells, cross((shape,), mixtures, settings))
