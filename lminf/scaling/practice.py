"""What public models used, and what an independent replication found: facts beside the laws.

Values of reports as remembered, to be confirmed where much depends on them; the two of OLMo 2 were
read in its configs.
"""

from typing import NamedTuple

import numpy as np

from lminf.scaling import stored


class Model(NamedTuple):
    name: str
    n_nv: float  # parameters without the vocabulary's
    tokens: float
    vocab_size: int
    lr: float  # peak
    batch: float | None  # tokens; None: not stated
    source: str


_DATA = stored.read("practice.json")
MODELS = tuple(Model(**fields) for fields in _DATA["models"])
SHOWN = 3
# Root-mean-square distance of a rule from the best (rate, batch) of 18 (N, D), N 46M to 2.9B and D
# 0.13B to 1.0B, in factors of two; NaN: the rule names none. Second-hand: numbers of L. Lingle's
# replication, lucaslingle.substack.com.
REPLICATION = {
    name: (lr, np.nan if batch is None else batch)
    for name, (lr, batch) in _DATA["replication"].items()
}


def vocabularies(n_nv: float) -> str:
    """What the models next to n_nv in size chose, as a sentence."""
    nearest = sorted(MODELS, key=lambda model: abs(np.log(model.n_nv / n_nv)))[:SHOWN]
    chosen = ", ".join(f"{model.name} {model.vocab_size:,}" for model in nearest)
    return f"Public models next in size chose {chosen}."
