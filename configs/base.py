"""The fields that every experiment has."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from lminf import config
from lminf.errors import InputError


def small_shape() -> ConfigDict:
    """The shape that both laptop studies start from: 98,048 parameters beside the vocabulary."""
    return ConfigDict(
        {
            "width": 64,
            "num_layers": 2,
            "num_heads": 1,  # of 64 channels: four of 16 train at half the speed on a CPU
            "num_kv_heads": 1,
            "hidden_dim": 170,
            "tied": False,
        }
    )


def experts(*, hidden: int) -> ConfigDict:
    """A mixture in the MLP's place, beside an expert that reads every token; none to begin with."""
    return ConfigDict(
        {
            "count": 0,  # 0: an MLP
            "top_k": 1,
            "hidden_dim": hidden,  # of one expert
            "shared_dim": hidden,  # of the one that reads every token; 0: there is none
            "dense_layers": 0,  # layers at the start with an MLP instead
            "router": "token_choice",  # or loss_free, hash, expert_choice (lminf.models.routers)
        }
    )


def get_config(arg: str = "", *, variants: Sequence[str] = ("tiny",)) -> ConfigDict:
    """The shared fields; `arg` is the variant after the colon, "" being the full form.

    A config file names its `variants`, so that a mistyped one is an error and not the full form.
    """
    if arg and arg not in variants:
        raise InputError(f"there is no variant {arg!r}; {config.closest(arg, variants)}")
    c = ConfigDict()
    c.seed = 0  # every random stream is derived from it
    return c
