"""Length, vocabulary and hyper-parameters of language models."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lminf.attention.policies.eviction import H2O, TOVA, SirLLM
    from lminf.attention.policies.prompt_compression import SnapKV, ThinK
    from lminf.attention.policy import Full, LMInfinite, ReRoPE, SelfExtend, Streaming, Window
    from lminf.generation import Sampling
    from lminf.lm import LM

__all__ = [
    "H2O",
    "LM",
    "TOVA",
    "Full",
    "LMInfinite",
    "ReRoPE",
    "Sampling",
    "SelfExtend",
    "SirLLM",
    "SnapKV",
    "Streaming",
    "ThinK",
    "Window",
    "__version__",
]
_HOMES = {
    "LM": "lminf.lm",
    "Sampling": "lminf.generation",
    **dict.fromkeys(("SnapKV", "ThinK"), "lminf.attention.policies.prompt_compression"),
    **dict.fromkeys(("H2O", "TOVA", "SirLLM"), "lminf.attention.policies.eviction"),
}


def __getattr__(name: str):
    # On first use: the command line must start without waiting for jax.
    if name not in __all__:
        raise AttributeError(f"module 'lminf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "lminf.attention.policy")), name)
