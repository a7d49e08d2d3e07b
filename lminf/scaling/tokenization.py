"""What other studies say about tokenizers and budgets: evidence beside the vocabulary law.

Bytes per parameter   the compute-optimal ratio of training bytes to parameters is about 60 for any
                      tokenizer; the compression of best loss falls with compute.
                      arXiv:2605.01188, English, 50M to 7B; the value as quoted by one reader.
Input vocabulary      with input and output vocabularies apart, the loss falls linearly in the
                      logarithm of the input's; a larger output's helps large models alone. 400M
                      parameters with 12.8M input entries reach the loss of 1B with 0.1M.
                      arXiv:2501.16975; no slope is stated here, because none was read.
"""

import math
from typing import NamedTuple

from lminf.errors import InputError
from lminf.scaling import accounting

BYTES_PER_PARAMETER = 60.0


class Allocation(NamedTuple):
    n: float  # parameters
    d: float  # tokens
    data_bytes: float


def allocate(*, flops: float, bytes_per_token: float) -> Allocation:
    """Compute-optimal parameters and tokens at FLOPs = 6 N D and BYTES_PER_PARAMETER bytes of text
    for each parameter: a coarser tokenizer asks for fewer tokens per parameter, not fewer bytes."""
    accounting.require_raw("flops", flops, "flops")
    tokens_per_parameter = BYTES_PER_PARAMETER / bytes_per_token
    n = math.sqrt(flops / (6 * tokens_per_parameter))
    return Allocation(n, n * tokens_per_parameter, n * BYTES_PER_PARAMETER)


def input_vocabulary_loss(
    vocab_size: float, *, small: tuple[float, float], large: tuple[float, float]
) -> float:
    """Loss of an input vocabulary, linear in its logarithm through two measured (entries, loss)."""
    (size, loss), (other_size, other_loss) = small, large
    if not 0 < size < other_size:
        raise InputError(
            f"input vocabularies of {size:g} and {other_size:g} entries give no slope; measure two "
            "sizes, the smaller first"
        )
    slope = (other_loss - loss) / math.log(other_size / size)
    return loss + slope * math.log(vocab_size / size)
