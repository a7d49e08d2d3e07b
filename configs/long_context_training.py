"""Training on long documents with a raised rotary base, beside LM-Infinite without training.

Topic      training
Question   When is it worth training a model for twice its length, where LM-Infinite needs none?
Paper      ProLong (Gao et al. 2024, arXiv:2410.02660); LM-Infinite (Han et al. 2024,
           arXiv:2308.16137)
Data       apt install linux-doc-6.1
Command    python -m experiments.long_context_training
Time       not measured: for an accelerator. A step of 2 rows of 16,384 tokens would take about half
           an hour of a CPU core (estimated). The same command with the same --out resumes
Expected   not measured; :short says what to look for. Training is worth it where its loss past the
           trained length is lower than LM-Infinite's by more than plain text of the kind gives
           below it
Short      --config=:short reads 11,264 tokens of 3 held-out documents with SmolLM2-135M (trained
           at 8,192) and trains 8 steps of 2,048 tokens, which show it the new base and the kind of
           text but no long distance: 40 minutes of processor time beside other work on an Intel
           Xeon. Past 10,240 tokens LM-Infinite is 0.430 nats/token (0.352 to 0.502; n = 3) below
           the model as it is, without training; the raised base alone 0.357 (0.341 to 0.383), for
           0.06 to 0.08 at all positions before. Adapters (248 s of processor time) are 0.069 (0.034
           to 0.093) below LM-Infinite there, but as much below it at all positions (0.046 to
           0.116): they learnt the kind of text, and the price of the base is gone. All parameters
           (283 s) are not told apart from adapters
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
        c.documents, c.length, c.dtype = 3, 11_264, "bfloat16"
        c.training.documents = 8
        c.training.length, c.training.batch = 2048, 1
        c.training.steps, c.training.every = 8, 4
    if arg == "tiny":
        c.model, c.text = "tiny", "code"
        c.policy, c.rope_base = "lm_infinite:window=64,sinks=4", 40_000.0
        c.documents, c.length, c.block = 3, 192, 64
        c.training.documents = 4
        c.training.length, c.training.batch = 128, 8
        c.training.steps, c.training.every = 4, 2
    if arg in VARIANTS:  # too few steps for a schedule
        c.training.lora_schedule = "constant:peak=1e-3"
        c.training.finetuned_schedule = "constant:peak=1e-4"
        c.training.dtype, c.training.remat = "float32", "none"
    return c
