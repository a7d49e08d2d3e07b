"""What the numbers and tuples of configs may be outside of dataclasses, by the name of the field.

A name means the same in every experiment, so one table serves all of them and config files of
users. A field is looked up by its dotted name, then by what stands after the last dot; whatever is
in no table must be finite. Sections of a dataclass (`class`) are checked when it is built.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from lminf.config import CLASS
from lminf.errors import InputError
from lminf.ranges import Range, shown

MOST = 2**31 - 1  # steps, sizes and seeds are int32 on devices
COUNT, COUNT_OR_NONE = Range(min=1, max=MOST), Range(min=0, max=MOST)
SHARE, AMOUNT = Range(min=0, max=1), Range(above=0)
RANGES = {
    **dict.fromkeys(
        (
            # training
            "steps", "grad_accum_steps", "every", "evaluate_every", "last", "batches", "log_every",
            "batch", "replicates", "rounds", "labels", "coordinate_steps", "devices",
            "rows",
            # shapes
            "width", "num_heads", "num_kv_heads", "hidden_dim", "top_k", "vocab",
            "vocabs", "vocab_size", "vocab_sizes", "seq_len", "head_dim", "base_width", "widths",
            "experts", "pieces",
            # measuring
            "beyond", "block", "capacities", "continuation", "documents", "draws",
            "key_value_lengths",
            "key_value_prompts", "lengths", "passkey_length", "passkeys", "positions", "prompt",
            "prompts", "queries", "instances", "contexts", "num_keys", "num_values",
            "longest", "requested", "max_new_tokens", "new_tokens", "mtp_heads",
            "parts", "validation", "corpus_documents", "slots", "questions",
            "words", "span", "embedding_layers", "segment_len", "recalled", "needles",
            "retrieved_together", "trained_length",
            # worlds
            "sentences", "test_sentences", "people",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "seed", "sample", "count", "dense_layers", "shared_dim", "shared", "chunk", "layers",
            "nll_length", "unbounded_to", "characters", "sample_characters",
        ),
        COUNT_OR_NONE,
    ),
    **dict.fromkeys(
        ("num_layers", "base_layers", "layer_counts", "encoder_layers", "decoder_layers"),
        Range(min=1, max=2**12),
    ),
    "tokens": Range(min=1, max=2**63 - 1),  # read in all
    "length": Range(min=2, max=MOST),  # a token and the one it predicts
    "times": Range(min=2, max=2**16),  # the trained length
    "depths": SHARE,
    "chat_shares": SHARE,
    "warmup": SHARE,
    "decay": SHARE,
    "question_share": SHARE,
    "key_value_depths": SHARE,
    "held_out": Range(above=0, below=1),
    "efficiency": Range(above=0, max=1),  # share of the peak
    "long_share": Range(above=0, below=1),
    "clip": Range(min=0),  # 0: gradients are not clipped
    "z_loss": Range(min=0, max=1),
    "threshold": Range(min=0, max=1),
    "draft_tokens": Range(min=1, max=1024),
    "rope_base": Range(min=1),
    "beta": AMOUNT,
    "temperature": AMOUNT,
    "capacity_factor": AMOUNT,
    "preference_scale": AMOUNT,
    "rates": AMOUNT,
    "rate": AMOUNT,
    "coordinate_rate": AMOUNT,
    "budgets": AMOUNT,
    "n_nv": Range(min=1e4, max=1e14),  # as tables of runs have it
    "profile": Range(),  # exponents; of train_lm, steps
    "stages": Range(),  # texts
    "mtp_rows": Range(),  # texts
    "ratios": Range(min=2, max=MOST),  # tokens to an embedding
}  # fmt: skip
# Tuples hold something, but for these of an experiment.
MAY_BE_EMPTY = {
    "train_lm.profile", "train_lm.stages", "rate_transfer.widths", "rate_transfer.layer_counts",
    "vocab_expansion.steps", "vocab_expansion.mtp_rows",
    *(f"long_context_eval.{task}{name}" for task in ("", "key_value_")
      for name in ("lengths", "prompts")),
}  # fmt: skip
# An item that stands twice would be measured twice, but for the items of what goes with another.
MAY_REPEAT = {"prompts", "key_value_prompts", "train_lm.profile", "chat_shares"}


def check(config: ConfigDict, *, experiment: str) -> None:
    """Raises InputError for the first field of an experiment's config that is a number outside its
    range, or an empty tuple, or one that holds an item twice.
    """
    for name, value in numbers(config):
        full_name = f"{experiment}.{name}"
        if value == () and full_name not in MAY_BE_EMPTY:
            raise InputError(f"--config.{name}=(): give at least one")
        if isinstance(value, tuple) and not {name, full_name} & MAY_REPEAT:
            twice = next((item for item in value if value.count(item) > 1), None)
            if twice is not None:
                raise InputError(f"--config.{name} holds {shown(twice)} twice; give it once")
        stated = range_of(name) or Range()
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)) and (expectation := stated.problem(item)):
                each = " for each" if isinstance(value, tuple) else ""
                raise InputError(f"--config.{name}={shown(value)}: give {expectation}{each}")


def range_of(name: str) -> Range | None:
    """The range of a field by its dotted name; None if none is stated."""
    return RANGES.get(name) or RANGES.get(name.rpartition(".")[2])


def numbers(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of the fields that are numbers, or tuples that may hold some."""
    for key in () if CLASS in config else config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
