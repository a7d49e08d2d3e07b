"""The best learning rate of a small model, taken over by wider and deeper ones.

Topic      scaling
Question   Does the learning rate that is best for a small model stay the best for wider and deeper
           ones, in the usual parametrization and in CompleteP?
Paper      CompleteP (Dey et al. 2025, arXiv:2505.01618)
Command    python -m experiments.rate_transfer
Time       1,170 s of processor time for 11 of the 12 sizes, on two shared cores of an Intel Xeon;
           the same command with the same --out resumes
Expected   3 seeds, shifts of the best rate in doublings with 95 % intervals: from width 32 to 128
           it falls by 1.73 (1.29 to 2.18) in the usual parametrization, where training at the
           base's rate costs 0.15 nats/token, and by 0.19 (-0.35 to 0.73) in CompleteP. From 2 to 16
           layers of width 32 neither shift is told from 0, but the usual parametrization gets worse
           with depth, 4.53 to 5.09 nats/token at its best rates, and CompleteP better, 4.53 to
           4.24. Eight steps move the hidden states of the largest models up to 3.9 times as far as
           the base's in the usual parametrization, and 0.43 to 0.99 times in CompleteP
Tiny       --config=:tiny trains two sizes for a few steps, which shows nothing: under a minute
Sizes      --config=:h100: widths to 2,048 and depths to 64 of a base of 256 and 4; not run here
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "h100")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.data = ConfigDict()
    c.data.corpus = "library"  # or prose: the docstrings and the reference alone
    c.data.vocab = 512  # byte-level BPE, trained on the text
    c.data.length = 32  # tokens of a row
    c.data.batch = 8  # rows of a step
    c.head_dim = 32  # of every size; a model has width / head_dim heads
    c.base_width, c.base_layers = 32, 2  # of the model that is tuned
    c.widths = (64, 128)  # of others with as many layers
    c.layer_counts = (4, 8, 16)  # of others as wide
    c.parametrizations = ("standard", "completep")
    c.tokens = 65_536  # of a run; every token is seen once
    c.rates = tuple(1e-3 * 2**i for i in range(7))  # peaks, trained side by side
    c.replicates = 3  # seeds from c.seed on, trained side by side
    c.schedule = "cosine:peak=1,floor=1e-5,warmup=0"
    c.warmup = 0.1  # share of the steps
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.clip = 1.0
    c.coordinate_steps = 8  # after which the coordinate check looks at the hidden states
    c.coordinate_rate = 4e-3  # constant, of those steps
    if arg == "tiny":
        c.widths, c.layer_counts = (64,), ()
        c.tokens, c.rates, c.replicates = 2048, (2e-3, 8e-3), 1
        c.coordinate_steps = 2
    elif arg == "h100":
        c.data.vocab, c.data.length, c.data.batch = 32_768, 1024, 128
        c.head_dim, c.base_width, c.base_layers = 64, 256, 4
        c.widths, c.layer_counts = (512, 1024, 2048), (16, 64)
        c.tokens = 400_000_000
        c.rates = tuple(2.0**-i for i in (13, 12, 11, 10, 9, 8, 7))
    return c
