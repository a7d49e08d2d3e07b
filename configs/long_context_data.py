"""Data for long contexts: what short documents can teach a model that is to look far back.

Topic      training
Question   At equal tokens, which data transform teaches a model of short contexts to find an answer
           at 8 times their length: plain packing, Untie the Knots, Dataset Decomposition, a mixture
           with long documents, a document mask?
Paper      Untie the Knots (Tian et al. 2024, arXiv:2409.04774), Dataset Decomposition (Pouransari
           et al. 2024, arXiv:2405.13226), ProLong (Gao et al. 2024, arXiv:2410.02660)
Command    python -m experiments.long_context_data
Time       14 minutes beside other work on two CPU cores; the same command with the same --out
           resumes
Expected   at 8 times the short length plain packing finds 0.82 of the needles, Untie the Knots
           0.119 more (95 % interval over five seeds 0.098 to 0.140) and the mixture with 60 % long
           documents 0.168 more; a document mask and Dataset Decomposition cannot be told from plain
           packing. Losses of long documents: 2.95 (mixture), 3.24 (Untie the Knots), 3.29 (mask),
           3.35 (plain), 3.68 (Decomposition)
Tiny       --config=:tiny trains a smaller world at 16 and 64 tokens: under a minute
H100       --config=:h100: 4,096 and 32,768 tokens on one GPU
Pod        --config=:pod: 8,192 and 65,536 tokens
"""

from ml_collections import ConfigDict

from lminf.config import to_config
from lminf.configs import base
from lminf.configs.train_lm import shape
from lminf.parallel.mesh import MeshShape

VARIANTS = ("tiny", "h100", "pod")
KNOTTED = "(untie_the_knots:end_id=0,knot_ids=(1,2,3,4),weights=(0.2,0.8))"


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.num_keys, c.num_values = 128, 4  # of the world (experiments/_recall.py)
    c.model = shape(width=64, layers=1, heads=2, kv_heads=2, hidden=128)
    # Stages as of train_lm: one of short documents, and one of long rows by each recipe.
    c.short_stage = (
        "tokens=409600,length=32,batch=64,plan=(best_fit),schedule=(constant:peak=5e-3,warmup=20)"
    )
    c.long_stage = (
        "tokens=122880,length=256,batch=8,rope_base=8e4,"
        "schedule=(cosine:peak=5e-3,floor=5e-4,warmup=10)"
    )
    c.recipes = recipes(shortest=5)
    # Of the tokens, in documents as long as a row of the long stage; the others are as long as one
    # of the short stage. A mixture has as many long ones as its weights ask for.
    c.long_share = 0.05
    c.replicates = 5  # seeds
    c.contexts = 128  # that needles are asked in, of each length
    c.documents = 32  # long ones that losses by position are of
    c.optimizer = "adamw:b2=0.95,weight_decay=0.01"
    c.dtype, c.remat = "float32", "none"
    c.mesh, c.strategy = to_config(MeshShape()), "data"
    if arg == "tiny":
        c.num_keys, c.contexts, c.documents, c.replicates = 64, 4, 4, 1
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=48)
        c.short_stage = (
            "tokens=4096,length=16,batch=32,plan=(best_fit),schedule=(constant:peak=5e-3)"
        )
        c.long_stage = "tokens=4096,length=64,batch=8,rope_base=8e4,schedule=(constant:peak=1e-3)"
        c.recipes = recipes(shortest=4)
    elif arg:
        large(c, arg)
    return c


def recipes(*, shortest: int) -> ConfigDict:
    """Fields of the long stage by the name of the recipe; 2^shortest tokens is a short document."""
    return ConfigDict(
        {
            "plain": "plan=(concat)",
            "untie_the_knots": f"plan=(concat),transforms={KNOTTED}",
            "decomposition": f"plan=(decomposition:shortest={shortest})",
            "prolong_mix": "plan=(mixture:weights=(0.4,0.6),plan=best_fit)",
            "document_mask": "plan=(concat:documents=apart)",
        }
    )


def large(c: ConfigDict, size: str) -> None:
    """Shapes for accelerators, in bfloat16: a world whose rows hold thousands of keys."""
    c.dtype, c.remat = "bfloat16", "full"
    c.replicates, c.contexts, c.documents = 5, 64, 64
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    if size == "h100":
        c.num_keys, c.num_values = 8192, 4
        c.model = shape(width=768, layers=12, heads=12, kv_heads=4, hidden=2048)
        short, long, rows, shortest = 4096, 32_768, 64, 12
    else:
        c.num_keys, c.num_values = 16_384, 4
        c.model = shape(width=2048, layers=16, heads=16, kv_heads=8, hidden=8192)
        c.mesh.data, c.mesh.fsdp, c.strategy = 1, -1, "zero3"
        short, long, rows, shortest = 8192, 65_536, 2048, 13
    c.short_stage = (
        f"tokens={4000 * short * rows},length={short},batch={rows},plan=(best_fit),"
        f"schedule=(constant:peak=6e-4,warmup=200)"
    )
    c.long_stage = (
        f"tokens={1000 * short * rows},length={long},batch={rows * short // long},rope_base=8e6,"
        f"schedule=(cosine:peak=3e-4,floor=3e-5,warmup=100)"
    )
    c.recipes = recipes(shortest=shortest)
