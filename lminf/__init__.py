"""Length, vocabulary and hyper-parameters of language models."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lminf.attention.condense import SnapKV, ThinK
    from lminf.attention.evict import H2O, TOVA, SirLLM
    from lminf.attention.hip import HiP
    from lminf.attention.infinite_hip import InfiniteHiP
    from lminf.attention.infllm import InfLLM
    from lminf.attention.longheads import LongHeads
    from lminf.attention.policies import (
        Full,
        Lambda,
        LeakyReRoPE,
        LMInfinite,
        PerHead,
        PerLayer,
        ReRoPE,
        SelfExtend,
        Streaming,
        Window,
    )
    from lminf.attention.top_k import TopK
    from lminf.generation import Sampling
    from lminf.lm import LM

__all__ = [
    "H2O",
    "LM",
    "TOVA",
    "Full",
    "HiP",
    "InfLLM",
    "InfiniteHiP",
    "LMInfinite",
    "Lambda",
    "LeakyReRoPE",
    "LongHeads",
    "PerHead",
    "PerLayer",
    "ReRoPE",
    "Sampling",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "Streaming",
    "ThinK",
    "TopK",
    "Window",
    "__version__",
]
_HOMES = {
    "LM": "lminf.lm",
    "Sampling": "lminf.generation",
    **dict.fromkeys(("SnapKV", "ThinK"), "lminf.attention.condense"),
    **dict.fromkeys(("H2O", "TOVA", "SirLLM"), "lminf.attention.evict"),
    "HiP": "lminf.attention.hip",
    "InfiniteHiP": "lminf.attention.infinite_hip",
    "InfLLM": "lminf.attention.infllm",
    "LongHeads": "lminf.attention.longheads",
    "TopK": "lminf.attention.top_k",
}


def __getattr__(name: str):
    # On first use: the command line must start without waiting for jax.
    if name not in __all__:
        raise AttributeError(f"module 'lminf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "lminf.attention.policies")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
