"""Weight decay, batch and learning rate by published power laws that have no data here to refit.

N non-embedding parameters, D training tokens, both raw; batches in tokens. The constants were not
read in the papers: `CONFIDENCE` says what stands behind each. They set an order of magnitude.
"""

import math

from lminf.scaling import accounting

CONFIDENCE = {
    "weight_decay": "arXiv:2505.13738; constants quoted alike by several readers; 111M to 3.3B",
    "optimal_batch": "arXiv:2505.13738; exponent quoted by several readers, factor from memory",
    "critical_batch": "arXiv:2505.13738; exponent quoted by several readers, factor from memory",
    "critical_batch_adam": "arXiv:2410.21676; quoted by two readers; 85M to 1.2B, context 512",
    "scaled_lr": "arXiv:2505.23971, batch warm-up on OLMo 1B and 7B; the usual rule for AdamW",
    "wsd_lr": "arXiv:2601.05049; quoted by one reader, and a second one's value is 3 x higher",
}
SEQUENCE = 2048  # tokens, of arXiv:2505.13738, whose batches are in sequences
SHORT_SEQUENCE = 512  # tokens, of arXiv:2410.21676


def timescale(*, lr: float, weight_decay: float, batch: float, d: float) -> float:
    """tau = B / (lr lambda D): over which share of the run AdamW averages its updates."""
    return batch / (lr * weight_decay * d)


def optimal_timescale(*, n: float, d: float) -> float:
    """tau of least loss, 1.084 (D/N)^-0.527."""
    accounting.require_raw("n", n, "n")
    accounting.require_raw("d", d, "d")
    return 1.084 * (d / n) ** -0.527


def weight_decay(*, lr: float, batch: float, n: float, d: float) -> float:
    """AdamW's decoupled weight decay at the timescale of least loss, for a peak learning rate."""
    return batch / (lr * d * optimal_timescale(n=n, d=d))


def optimal_batch(*, d: float) -> float:
    """Batch of least loss, 0.0306 D^0.383 sequences; for any N."""
    return SEQUENCE * 0.0306 * accounting.require_raw("d", d, "d") ** 0.383


def critical_batch(*, d: float) -> float:
    """Batch at which twice the least tokens D are needed for a loss, 0.0471 D^0.462 sequences."""
    return SEQUENCE * 0.0471 * accounting.require_raw("d", d, "d") ** 0.462


def tokens_at_batch(*, d: float, batch: float) -> float:
    """Tokens that a batch needs for the loss that small ones reach with D: D (1 + B / B_crit)."""
    return d * (1 + batch / critical_batch(d=d))


def critical_batch_adam(*, d: float) -> float:
    """Batch that needs 20 % more steps than ideal scaling, 22.91 D^0.47 sequences, D in 1e6. At 20
    tokens per parameter it is the paper's 93.20 N^0.47; N alone hardly moves it (N^0.087)."""
    return SHORT_SEQUENCE * 22.91 * (accounting.require_raw("d", d, "d") / 1e6) ** 0.47


def scaled_lr(lr: float, *, batch_factor: float) -> float:
    """Learning rate after the batch grew by a factor during the run."""
    return lr * math.sqrt(batch_factor)


def wsd_lr(*, n: float, d: float) -> float:
    """Peak learning rate for warm-up-stable-decay, 38.46 N^-0.222 D^-0.351: it falls with D, where
    the step law's for a cosine with a fixed floor rises."""
    accounting.require_raw("n", n, "n")
    accounting.require_raw("d", d, "d")
    return 38.46 * n**-0.222 * d**-0.351
