"""Length, vocabulary and hyper-parameters of language models."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lminf.lm import LM

__all__ = ["LM", "__version__"]


def __getattr__(name: str):
    # The command line must start without waiting for jax.
    if name == "LM":
        from lminf.lm import LM

        return LM
    raise AttributeError(f"module 'lminf' has no attribute {name!r}")
