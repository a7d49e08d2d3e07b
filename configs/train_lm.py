"""Training a language model, on a laptop or a pod.

Topic      training
Question   Which loss does a model of this shape reach on this text, and how fast?
Command    python -m experiments.train_lm
Time       about 15 minutes on two CPU cores
Expected   the default byte model: 1.4 bits per byte on held-out Python documentation; it overfits
           from step 750 on
Tiny       --config=:tiny trains 4 layers on 64 bytes of context: under a minute; 2.0 bits per byte
Sizes      --config=:125m, :1b, :7b on tokens of a fetched model's tokenizer
"""

from ml_collections import ConfigDict

from lminf.config import to_config
from lminf.configs import base
from lminf.parallel.distributed import Distributed
from lminf.parallel.mesh import MeshShape

VARIANTS = ("tiny", "10m", "125m", "1b", "7b")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.init = ""  # a model to go on from (a table name, folder, .gguf); "" starts afresh
    c.lora = ""  # lora:rank=16,alpha=32 trains adapters of it, "" all of it
    c.data = ConfigDict()
    # Token stores of `lminf tokenize` (folders, gs://…, s3://…) or text files, separated by commas;
    # "" is the interpreter's reference documentation.
    c.data.path = ""
    c.data.plan = "windows"  # or concat, best_fit, decomposition, mixture:weights=(3,1), …
    c.data.transforms = ""  # of rows: untie_the_knots:…, per_sequence, or both with a comma
    c.data.tokenizer = "bytes"  # or a model whose tokenizer to use; `init` has its own
    # Tokens of a row, and rows of a step over all devices; with stages, of what is evaluated.
    c.data.length, c.data.batch = 256, 16
    c.data.held_out = 0.05  # share of each text, its end, kept for evaluation
    c.model = shape(width=256, layers=6, heads=4, kv_heads=2, hidden=768)
    c.experts = base.experts(hidden=384)  # experts.count=8 makes it a mixture of experts
    c.attention = ""  # the policy of all layers; "" is that of `init`, or else full
    c.steps = 1000
    # In place of `steps` and `schedule`, texts such as
    # "tokens=65536,length=512,batch=8,rope_base=1e5,schedule=(constant:peak=1e-3)", which may have
    # a plan=(…) and transforms=(…) of their own.
    c.stages = ()
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    # completep:width=256,layers=6 for an optimizer and a schedule tuned on a model of that size.
    c.completep = ""
    c.schedule = "cosine:peak=2e-3,floor=2e-4,warmup=50"
    c.clip = 1.0  # of the gradient's norm
    c.z_loss = 0.0  # weight of the squared log-partition
    c.grad_accum_steps = 1  # pieces of a batch, one after another
    c.dtype = "float32"  # of the computation; master weights, norms and losses are float32
    c.remat = "none"  # none, dots, full: what the backward finds in memory
    c.not_finite = "stop"  # or skip: count the step and go on
    c.mesh = to_config(MeshShape())
    c.strategy = "data"  # data, zero1, zero2, zero3, tensor, context, expert, or name+name
    # Over mesh.stage: gpipe, 1f1b or zero_bubble, as in 1f1b:vocab=one_barrier,microbatches=16.
    c.pipeline = ""
    c.processes = to_config(Distributed())
    c.evaluate = ConfigDict()
    c.evaluate.every = 250  # steps; the state is saved each time
    c.evaluate.batches = 16  # at most
    c.evaluate.sample = 64  # tokens that the finished model writes
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 250  # steps, besides those of evaluation
    c.checkpoint.last = 2  # kept, and the best
    c.checkpoint.folder = ""  # gs://… or a path; "" is the run's own folder
    c.export = ""  # a new folder for the finished model, in Hugging Face's format
    c.log_every = 10  # steps
    c.watch = ""  # tensorboard, wandb, or both with a comma: who shows metrics.jsonl as well
    c.profile = ()  # (first, last) step to trace, for TensorBoard's profiler
    if arg == "tiny":
        c.data.length, c.data.batch = 64, 32
        c.model = shape(width=128, layers=4, heads=4, kv_heads=2, hidden=384)
        c.steps = 200
        c.schedule = "cosine:peak=3e-3,floor=3e-4,warmup=20"
        c.evaluate.every = c.checkpoint.every = 100
        c.evaluate.batches = 8
    elif arg == "10m":
        c.model = shape(width=320, layers=7, heads=5, kv_heads=5, hidden=864)
        c.data.length, c.data.batch = 512, 8
    elif arg:
        large(c, arg)
    return c


def shape(*, width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> ConfigDict:
    """A Llama shape; the vocabulary is the tokenizer's."""
    return ConfigDict(
        {
            "width": width,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "hidden_dim": hidden,
            "rope_base": 10_000.0,
            "tied": True,
        }
    )


def large(c: ConfigDict, size: str) -> None:
    """Shapes for accelerators: bfloat16, sliced over every device."""
    c.data.tokenizer = "smollm2-135m-instruct"
    c.data.length, c.data.batch = 4096, 256
    c.data.plan = "concat"
    c.dtype, c.remat = "bfloat16", "full"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.strategy = "zero3"
    c.evaluate.every = c.checkpoint.every = 1000
    if size == "125m":
        c.model = shape(width=768, layers=12, heads=12, kv_heads=4, hidden=2048)
        c.steps, c.remat = 5000, "dots"
        c.schedule = "cosine:peak=1e-3,floor=1e-4,warmup=500"
    elif size == "1b":
        c.model = shape(width=2048, layers=16, heads=16, kv_heads=8, hidden=8192)
        c.steps = 20_000
        c.schedule = "cosine:peak=4e-4,floor=4e-5,warmup=1000"
    else:
        c.model = shape(width=4096, layers=32, heads=32, kv_heads=8, hidden=14336)
        c.model.tied = False
        c.data.batch = 1024
        c.steps = 35_000
        c.schedule = "cosine:peak=3e-4,floor=3e-5,warmup=2000"
