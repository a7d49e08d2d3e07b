"""What the Triton kernels of several operations compute alike. No JAX here."""

# Triton is no dependency: where it is missing, this file is not imported.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """To 2e-7, without the library of one vendor."""
    # 1 - 2 / (1 + e^2x) cancels near 0; there the odd polynomial is exact to 1e-9.
    square = x * x
    series = -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    near = x * (1 + square * series)
    far = 1 - 2 / (1 + tl.exp2(tl.minimum(x, 40.0) * (2 * LOG2_E)))
    return tl.where(tl.abs(x) < 0.2, near, far)
