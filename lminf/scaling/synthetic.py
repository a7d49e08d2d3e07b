"""Small sweeps drawn from the published laws, for tiny runs that must work without data."""

import dataclasses

import numpy as np

from lminf.scaling import fertility, published
from lminf.scaling.tables import StepTable, VocabTable

FAMILIES = ((33_222_784, 512), (84_834_176, 768), (150_834_176, 768), (631_668_352, 1536))
SIZES = (4096, 6144, 8192, 10240, 16384, 24576, 32768, 48128, 64512, 96256)


def vocab_sweep(*, noise: float, seed: int, checkpoints: int = 8) -> VocabTable:
    """Runs of `checkpoints` rows from the published approach 3 in true tokens.

    `noise` is the standard deviation of L_u of a run, relative; its checkpoints share it.
    """
    random = np.random.default_rng(seed)
    rows = [
        (size, width, n, 36 * n * (k + 1) / checkpoints, 1 + noise * wobble)
        for n, width in FAMILIES
        for size, wobble in zip(SIZES, random.normal(size=len(SIZES)), strict=True)
        for k in range(checkpoints)
    ]
    size, width, n, tokens, factor = (np.array(column, float) for column in zip(*rows, strict=True))
    characters = tokens / fertility.PUBLISHED.tokens_per_character(size)
    flops = 6 * (n + size * width) * tokens
    table = VocabTable(size, width, characters, n, flops, factor, "synthetic")
    return dataclasses.replace(table, loss=factor * published.LOSS_TOKENS.loss(table))


def step_grid(*, noise: float, seed: int) -> StepTable:
    """Nine groups of 9 x 7 cells: the step law's bowl around its own point, relative `noise`."""
    random = np.random.default_rng(seed)
    rows = []
    for n in (2e8, 5e8, 1e9):
        for d in (5e9, 2e10, 8e10):
            best = published.STEP.setting(n=n, d=d)
            for lr in 2.0 ** np.arange(-12, -7.9, 0.5):
                for batch in 2048 * 2.0 ** np.arange(5, 12):
                    excess = published.STEP.excess(
                        lr_factor=lr / best.lr, batch_factor=batch / (best.batch or 1.0)
                    )
                    loss = 2.5 * (n * d / 4e18) ** -0.05 * (1 + excess)
                    rows.append((n, d, lr, batch, loss * (1 + noise * random.normal())))
    n, d, lr, batch, loss = np.array(rows).T
    return StepTable(n, n, d, lr, batch, loss, 6 * n, 2048, "synthetic")
