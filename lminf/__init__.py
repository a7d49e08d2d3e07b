"""Length, vocabulary and hyper-parameters of language models."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lminf.attention.arrays import attend, attend_stepwise
    from lminf.attention.policies.block_topk import MoBA
    from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
    from lminf.attention.policies.hip import HiP, InfiniteHiP
    from lminf.attention.policies.infllm import InfLLM
    from lminf.attention.policies.longheads import LongHeads
    from lminf.attention.policies.prompt_compression import SnapKV, ThinK
    from lminf.attention.policies.topk import TopK
    from lminf.attention.policy import (
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
    from lminf.attention.rope import Alibi, NoEncoding, Rotary
    from lminf.lm.generate import Sampling
    from lminf.lm.lm import LM

__all__ = [
    "H2O",
    "LM",
    "TOVA",
    "Alibi",
    "Full",
    "HiP",
    "InfLLM",
    "InfiniteHiP",
    "LMInfinite",
    "Lambda",
    "LeakyReRoPE",
    "LongHeads",
    "MoBA",
    "NoEncoding",
    "PerHead",
    "PerLayer",
    "ReRoPE",
    "Rotary",
    "Sampling",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "Streaming",
    "ThinK",
    "TopK",
    "Window",
    "__version__",
    "attend",
    "attend_stepwise",
]
_HOMES = {
    "LM": "lminf.lm.lm",
    "Sampling": "lminf.lm.generate",
    **dict.fromkeys(("attend", "attend_stepwise"), "lminf.attention.arrays"),
    **dict.fromkeys(("Alibi", "NoEncoding", "Rotary"), "lminf.attention.rope"),
    **dict.fromkeys(("SnapKV", "ThinK"), "lminf.attention.policies.prompt_compression"),
    **dict.fromkeys(("H2O", "TOVA", "SirLLM"), "lminf.attention.policies.eviction"),
    "HiP": "lminf.attention.policies.hip",
    "InfiniteHiP": "lminf.attention.policies.hip",
    "InfLLM": "lminf.attention.policies.infllm",
    "LongHeads": "lminf.attention.policies.longheads",
    "MoBA": "lminf.attention.policies.block_topk",
    "TopK": "lminf.attention.policies.topk",
}


def __getattr__(name: str):
    # On first use: the command line must start without waiting for jax.
    if name not in __all__:
        raise AttributeError(f"module 'lminf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "lminf.attention.policy")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
