"""Published tables that are no part of the repository: where to get them."""

from pathlib import Path

from lminf.errors import InputError

SOURCES = {
    "vocab_law": "exp_data.csv of github.com/sail-sg/scaling-with-vocab",
    "step_law": "dense_lr_bs_loss.csv of github.com/step-law/steplaw",
}


def existing(path: str, experiment: str) -> str:
    """The path, if there is a file."""
    if not Path(path).is_file():
        raise InputError(
            f"there is no table {path}; get {SOURCES[experiment]} and give it with "
            f"--config.data=FILE, or run --config={experiment}:tiny, which needs none"
        )
    return path
