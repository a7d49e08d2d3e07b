"""Training on long documents with a raised rotary base, beside LM-Infinite without training.

Topic      training
Question   When is it worth training a model for twice its length, where LM-Infinite needs none?
Paper      ProLong (Gao et al. 2024, arXiv:2410.02660); LM-Infinite (Han et al. 2024,
           arXiv:2308.16137)
Data       apt install linux-doc-6.1
Command    python -m experiments.long_context_training
Time       not measured: for an accelerator. A step of 2 rows of 16,384 tokens would take about half
           an hour of a CPU core (estimated). The same command with the same --out resumes
Expected   not measured. Past 8,192 tokens the untrained model's loss climbs and LM-Infinite's does
           not (length_generalization); training is worth it where its loss there is lower than
           LM-Infinite's by more than it gives up, and costs, below 2,048
Short      --config=:short reads 11,264 tokens and trains 4 steps of 2,048, which show the new base
           and no distance that the model has not seen. Not run as a whole: on a busy core of an
           Intel Xeon a step took 39 s of processor time (adapters) or 41 s (all parameters), and
           the first reading 111 s with its compilation, so that all 30 take up to an hour
Tiny       --config=:tiny trains a byte model at 64 tokens, then at 128: a minute
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.text = "/usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz"  # a document each
    c.versions = ("none", "lm_infinite", "raised", "lora", "finetuned")
    c.policy = "lm_infinite:window=4096,sinks=10"  # of lm_infinite
    # The model's is 100,000. ProLong multiplies it by twice the ratio of the lengths: here 2.
    c.rope_base = 400_000.0
    c.documents = 8  # held-out ones, of at least `length` tokens
    c.length, c.block = 16_384, 2048  # tokens read of a document, and averaged into one row
    c.dtype = "float32"  # of the model that reads
    c.training = ConfigDict()
    c.training.documents = 14  # to train on, as long as those held out; few are so long
    c.training.length, c.training.batch = 16_384, 2  # tokens of a row, rows of a step
    c.training.steps, c.training.every = 30, 10  # in all, and from one checkpoint to the next
    c.training.optimizer = "adamw:b2=0.95,weight_decay=0"
    c.training.lora = "lora:rank=16,alpha=32"
    c.training.lora_schedule = "cosine:peak=1e-3,floor=1e-4,warmup=3"
    c.training.finetuned_schedule = "cosine:peak=1e-4,floor=1e-5,warmup=3"
    c.training.dtype, c.training.remat = "bfloat16", "full"
    if arg == "short":
        c.documents, c.length, c.dtype = 4, 11_264, "bfloat16"
        c.training.documents = 8
        c.training.length, c.training.batch = 2048, 1
        c.training.steps, c.training.every = 8, 4
        c.training.lora_schedule = "constant:peak=1e-3"
        c.training.finetuned_schedule = "constant:peak=1e-4"
        c.training.dtype, c.training.remat = "float32", "none"
    if arg == "tiny":
        c.model, c.text = "tiny", "code"
        c.policy, c.rope_base = "lm_infinite:window=64,sinks=4", 40_000.0
        c.documents, c.length, c.block = 3, 192, 64
        c.training.documents = 4
        c.training.length, c.training.batch = 128, 8
        c.training.steps, c.training.every = 4, 2
        c.training.lora_schedule = "constant:peak=1e-3"
        c.training.finetuned_schedule = "constant:peak=1e-4"
        c.training.dtype, c.training.remat = "float32", "none"
    return c
