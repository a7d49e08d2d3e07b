"""Loss by vocabulary size at equal FLOPs, measured: the optimum and its shift with the budget.

Topic      scaling
Question   How large should the vocabulary of a model be for its budget?
Paper      Scaling laws with vocabulary (Tao et al. 2024, arXiv:2407.13623)
Command    lminf sweep vocab --config=vocab_sweep:laptop
Time       :laptop took 1,770 s of processor time beside other work; 15 minutes on two idle cores
Expected   minima of L_u and of bits per character between the sizes: with the budget that of L_u
           moves to larger vocabularies, that of bits per character to smaller ones
Tiny       --config=:tiny: two sizes, a minute
Pod        --config=:pod: the seven families and ten sizes of the paper
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.run.sweep import Overrides, chain, cross, grid

VARIANTS = ("tiny", "laptop", "h100", "pod")

# layers, heads, width, hidden and D_max (tokens) of the paper's families.
PUBLISHED = (
    (8, 8, 512, 2048, 1.2e9),
    (12, 12, 768, 2048, 3.0e9),
    (16, 12, 768, 3072, 5.3e9),
    (18, 16, 1024, 4096, 11.7e9),
    (20, 24, 1536, 4800, 27.7e9),
    (22, 32, 2048, 5632, 54.8e9),
    (24, 32, 3200, 8192, 165.5e9),
)
PUBLISHED_SIZES = (4096, 6144, 8192, 10240, 16384, 24576, 32768, 48128, 64512, 96256)

# A factor of sqrt 2 apart, near both optima; two sizes beyond them at the top.
SIZES = (256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096, 5792, 8192, 16384)
OCTAVES = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Width, hidden and budgets (FLOPs) of the laptop's shapes: N_nv of 98,048, 55,296 and 221,184.
SHAPES = (
    (64, 170, (1e11, 2e11, 4e11)),
    (48, 128, (1e11, 2e11)),
    (96, 256, (4e11, 8e11)),
)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.data = ConfigDict()
    c.data.corpus = "library"  # or prose
    c.data.vocabs = SIZES  # one tokenizer training serves all of them
    c.data.vocab = 512  # of this cell
    c.data.characters = 256  # of a row, as many for every vocabulary; 0: `length` tokens instead
    c.data.length = 128  # tokens of a row
    c.data.batch = 4  # rows of a step
    c.model = base.small_shape()
    c.budgets = (1e11, 2e11, 4e11)  # FLOPs, 6 (N_nv + V d) D
    c.rates = (4e-3,)  # peaks, trained side by side; the best one counts
    c.replicates = 2  # seeds from c.seed on, trained side by side: what they differ by is the noise
    c.schedule = "wsd:peak=1,floor=0,warmup=0,decay=0"
    c.warmup = 0.1  # share of the first budget's steps, where the schedule says 0 steps
    c.decay = 0.25  # share of each budget's steps, in its own branch; 0: checkpoints of one run
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.clip = 1.0
    if arg == "tiny":
        c.data.vocabs, c.budgets, c.rates = (256, 512), (1e10, 2e10), (4e-3, 1.6e-2)
        c.replicates = 1
    elif arg in ("h100", "pod"):
        c.data.vocabs = PUBLISHED_SIZES
        c.data.characters, c.data.length, c.data.batch = 0, 2048, 512
        c.rates, c.replicates = (4e-4,), 1
        c.schedule, c.warmup, c.decay = "constant:peak=1,warmup=1000", 0.0, 0.0
        c.budgets = (1e18, 1e19)  # families() sets each family's own
    return c


def get_sweep(c: ConfigDict, arg: str = "") -> tuple[Overrides, ...]:
    sizes = grid({"data.vocab": c.data.vocabs})
    if arg == "tiny":
        return sizes
    if arg in ("h100", "pod"):
        return cross(families(arg), sizes)
    octaves = grid({"data.vocab": [size for size in OCTAVES if size in c.data.vocabs]})
    cells = []
    for (width, hidden, budgets), vocabs in zip(SHAPES, (sizes, octaves, octaves), strict=True):
        peak = 0.256 / width
        shape = {"model.width": width, "model.hidden_dim": hidden}
        cells.append(cross(({**shape, "budgets": budgets, "rates": (peak,)},), vocabs))
        # Whether half or twice the rate would do better, where either loss has its least.
        both_rates = {"budgets": budgets[:1], "rates": (peak / 2, peak * 2), "replicates": 1}
        cells.append(cross(({**shape, **both_rates},), grid({"data.vocab": (512, 4096)})))
    return chain(*cells)


def families(arg: str) -> tuple[Overrides, ...]:
    """The paper's shapes, each up to the FLOPs of its D_max at V = 16,384, in 20 checkpoints."""
    cells = []
    for layers, heads, width, hidden, tokens in PUBLISHED[: 2 if arg == "h100" else None]:
        n_nv = layers * (4 * width**2 + 3 * width * hidden)
        last = 6 * (n_nv + 16384 * width) * tokens
        cells.append({
            "model.num_layers": layers, "model.num_heads": heads, "model.num_kv_heads": heads,
            "model.width": width, "model.hidden_dim": hidden,
            "budgets": tuple(last * (i + 1) / 20 for i in range(20)),
        })  # fmt: skip
    return tuple(cells)
