"""Training with sparse attention: a block-sparse policy beside a window and full attention.

Topic      training
Question   What do policies that attend to few tokens cost in loss when a model is trained with
           them, and what do they save in time?
Paper      MoBA (Lu et al. 2025, arXiv:2502.13189)
Command    python -m experiments.train_attention
Time       about 10 minutes on two idle CPU cores; the same command with the same --out resumes
Expected   after 0.8M bytes of text MoBA ends 0.007 nats above full attention and the window 0.006
           below; one seed cannot tell either from no difference. At 1,024 tokens on a CPU, MoBA's
           steps take 1.5 times as long as those of full attention
Tiny       --config=:tiny trains 2 layers on 64 bytes of context: under a minute
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    # Beside all tokens: at most 512, the last ones or those of the query's block and three others.
    c.policies = ("full", "window:window=512", "moba:block=128,topk=4")
    c.text = ""  # a file of text; empty: the interpreter's reference documentation
    c.held_out = 0.05  # share of the text, its end
    c.model = shape(width=128, layers=4, heads=4, kv_heads=2, hidden=384)
    c.length, c.batch = 1024, 4  # bytes of a row, and rows of a step
    c.steps, c.evaluate_every = 200, 50
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.schedule = "cosine:peak=3e-3,floor=3e-4,warmup=20"
    if arg == "tiny":
        c.policies = ("full", "moba:block=8,topk=4")
        c.model = shape(width=32, layers=2, heads=4, kv_heads=2, hidden=64)
        c.length, c.batch, c.held_out = 64, 4, 0.005
        c.steps, c.evaluate_every = 20, 10
    return c
