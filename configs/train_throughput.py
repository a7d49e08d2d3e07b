"""Training speed on this machine, beside a plain torch loop of the same shape.

Topic      cost
Question   How many tokens per second does a train step process, and what share of it is Python?
Command    python -m experiments.train_throughput --config.peer=.venv-parity/bin/python
Time       2 minutes on two CPU cores
Expected   on an AMD EPYC (Zen 5) 1.85 x the speed of torch 2.13.0, and matrix products alone, at
           the rate of XLA, would give 3.5; on an Intel Xeon with AMX 0.85 and 1.5 were measured.
           Python takes less than 1 % of a step of 1M parameters
Tiny       --config=:tiny measures a small shape without the peer: under a minute
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.peer = ""  # a Python with torch; "" measures lminf alone
    c.model = shape(width=320, layers=7, heads=5, kv_heads=5, hidden=864)
    c.small = shape(width=128, layers=4, heads=4, kv_heads=4, hidden=384)  # 1M parameters
    c.data = ConfigDict({"vocab_size": 4096, "batch": 8, "length": 512})
    c.steps = 6  # timed in each round, after one that is not
    c.rounds = 3  # the two sides take turns
    if arg == "tiny":
        c.model = c.small.copy_and_resolve_references()
        c.data.length = 64
        c.rounds = 2
    return c
