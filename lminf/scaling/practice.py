"""What public models used, and what an independent replication found: facts beside the laws.

Values of reports as remembered, to be confirmed where much depends on them; the two of OLMo 2 were
read in its configs.
"""

from typing import NamedTuple

import numpy as np


class Model(NamedTuple):
    name: str
    n_nv: float  # parameters without the vocabulary's
    tokens: float
    vocab_size: int
    lr: float  # peak
    batch: float | None  # tokens; None: not stated
    source: str


MODELS = (
    Model("Llama-2-7B", 6.48e9, 2e12, 32_000, 3e-4, 4e6, "arXiv:2307.09288"),
    Model("Llama-2-70B", 68.5e9, 2e12, 32_000, 1.5e-4, 4e6, "arXiv:2307.09288"),
    Model("Llama-3-8B", 6.98e9, 15e12, 128_256, 3e-4, None, "arXiv:2407.21783"),
    Model("Llama-3-70B", 68.5e9, 15e12, 128_256, 1.5e-4, None, "arXiv:2407.21783"),
    Model("OLMo-2-7B", 6.48e9, 4e12, 100_352, 3e-4, 4.2e6, "its config"),
    Model("OLMo-2-13B", 12.7e9, 5e12, 100_352, 9e-4, 8.4e6, "its config"),
    Model("DeepSeek-7B", 6.07e9, 2e12, 102_400, 4.2e-4, 9.4e6, "arXiv:2401.02954"),
    Model("DeepSeek-67B", 65.7e9, 2e12, 102_400, 3.2e-4, 18.9e6, "arXiv:2401.02954"),
)
SHOWN = 3
# Root-mean-square distance of a rule from the best (rate, batch) of 18 (N, D), N 46M to 2.9B and D
# 0.13B to 1.0B, in factors of two; NaN: the rule names none. Second-hand: numbers of L. Lingle's
# replication, lucaslingle.substack.com.
REPLICATION = {
    "step": (0.70, 0.91),
    "deepseek": (1.27, 1.47),
    "moonlight": (1.01, 1.22),
    "porian": (1.80, 3.44),
    "microsoft": (1.79, np.nan),
}


def nearest(n_nv: float) -> list[Model]:
    """The models next to n_nv in size, the nearest first."""
    return sorted(MODELS, key=lambda model: abs(np.log(model.n_nv / n_nv)))[:SHOWN]


def vocabularies(n_nv: float) -> str:
    """What the models next to n_nv in size chose, as a sentence."""
    chosen = ", ".join(f"{m.name} {m.vocab_size:,}" for m in nearest(n_nv))
    return f"Public models next in size chose {chosen}."


def octaves(value: float, other: float) -> float:
    """How many factors of two `value` is above `other`; NaN where there is none."""
    return float(np.log2(value / other))
