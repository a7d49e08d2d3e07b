"""The fields that every experiment has."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from lminf import config
from lminf.errors import InputError


def get_config(arg: str = "", *, variants: Sequence[str] = ("tiny",)) -> ConfigDict:
    """The shared fields; `arg` is the variant after the colon, "" being the full form.

    A config file names its `variants`, so that a mistyped one is an error and not the full form.
    """
    if arg and arg not in variants:
        raise InputError(f"there is no variant {arg!r}; {config.closest(arg, variants)}")
    c = ConfigDict()
    c.seed = 0  # every random stream is derived from it
    return c
