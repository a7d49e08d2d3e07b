"""Weight decay, batch and learning rate by published power laws that have no data here to refit.

N non-embedding parameters, D training tokens, both raw; batches in tokens. The constants were not
read in the papers: each function says what stands behind its own. They set an order of magnitude.
"""

import math

from lminf.scaling import accounting

SEQUENCE = 2048  # tokens, of arXiv:2505.13738, whose batches are in sequences
SHORT_SEQUENCE = 512  # tokens, of arXiv:2410.21676


def optimal_timescale(*, n: float, d: float) -> float:
    """tau = B / (lr lambda D) of least loss, 1.084 (D/N)^-0.527: over which share of the run AdamW
    averages its updates. arXiv:2505.13738; constants quoted alike by several readers; 111M to 3.3B.
    """
    accounting.require_raw("n", n, "n")
    accounting.require_raw("d", d, "d")
    return 1.084 * (d / n) ** -0.527


def weight_decay(*, lr: float, batch: float, n: float, d: float) -> float:
    """AdamW's decoupled weight decay at the timescale of least loss, for a peak learning rate."""
    return batch / (lr * d * optimal_timescale(n=n, d=d))


def optimal_batch(*, d: float) -> float:
    """Batch of least loss, 0.0306 D^0.383 sequences; for any N. arXiv:2505.13738; exponent quoted
    by several readers, factor from memory."""
    return SEQUENCE * 0.0306 * accounting.require_raw("d", d, "d") ** 0.383


def critical_batch(*, d: float) -> float:
    """Batch at which twice the least tokens D are needed for a loss, 0.0471 D^0.462 sequences; a
    batch B needs D (1 + B / B_crit). As well known as `optimal_batch`."""
    return SEQUENCE * 0.0471 * accounting.require_raw("d", d, "d") ** 0.462


def critical_batch_adam(*, d: float) -> float:
    """Batch that needs 20 % more steps than ideal scaling, 22.91 D^0.47 sequences, D in 1e6. At 20
    tokens per parameter it is the paper's 93.20 N^0.47; N alone hardly moves it (N^0.087).
    arXiv:2410.21676; quoted by two readers; 85M to 1.2B, context 512."""
    return SHORT_SEQUENCE * 22.91 * (accounting.require_raw("d", d, "d") / 1e6) ** 0.47


def scaled_lr(lr: float, *, batch_factor: float) -> float:
    """Learning rate after the batch grew by a factor during the run. arXiv:2505.23971, batch
    warm-up on OLMo 1B and 7B; the usual rule for AdamW."""
    return lr * math.sqrt(batch_factor)


def wsd_lr(*, n: float, d: float) -> float:
    """Peak learning rate for warm-up-stable-decay, 38.46 N^-0.222 D^-0.351: it falls with D, where
    the step law's for a cosine with a fixed floor rises. arXiv:2601.05049; quoted by one reader,
    and a second one's value is 3 x higher."""
    accounting.require_raw("n", n, "n")
    accounting.require_raw("d", d, "d")
    return 38.46 * n**-0.222 * d**-0.351
