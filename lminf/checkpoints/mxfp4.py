"""Weights in MXFP4, as GPT-OSS stores those of its experts: dequantised when they are read.

32 values share an exponent; each is 4 bits, two to a byte, the low ones first. Source: OCP
Microscaling Formats (MX) Specification 1.0.
"""

from collections.abc import Callable, Mapping

import numpy as np

from lminf.errors import InputError

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([VALUES, -VALUES])
BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block of 32 values


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, I, O] float32 of blocks [E, O, I / 32, 16] and scales [E, O, I / 32], both uint8."""
    pairs = np.stack([VALUES[blocks & 0xF], VALUES[blocks >> 4]], -1)
    values = np.ldexp(pairs.reshape(*scales.shape, -1), scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:2], -1).swapaxes(1, 2)


def named(
    shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray], source: str
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The shapes and the function that reads a tensor, with dequantised ones in place of their
    blocks and scales.
    """
    names = {name.removesuffix(BLOCKS) for name in shapes if name.endswith(BLOCKS)}
    plain = {
        name: shape
        for name, shape in shapes.items()
        if name.removesuffix(BLOCKS) not in names and name.removesuffix(SCALES) not in names
    }
    for name in names:
        blocks, scales = shapes[name + BLOCKS], shapes.get(name + SCALES)
        if len(blocks) != 4 or blocks[3] != BYTES or scales != blocks[:3]:
            raise InputError(
                f"{source} holds {name}{BLOCKS} of the shape {blocks} beside scales of {scales}, "
                f"which are no blocks of MXFP4; fetch the checkpoint again, whole"
            )
        plain[name] = (blocks[0], blocks[2] * 2 * BYTES, blocks[1])

    def read(name: str) -> np.ndarray:
        if name not in names:
            return tensor(name)
        return dequantise(tensor(name + BLOCKS), tensor(name + SCALES))

    return plain, read
