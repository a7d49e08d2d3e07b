"""Attention and loss kernels: arrays in, arrays out. Imports nothing of lminf."""

from lminf.kernels.block_sparse.api import block_sparse_attention
from lminf.kernels.common.dispatch import Decision, explain
from lminf.kernels.common.masks import GlobalDistance, SegmentIds
from lminf.kernels.cross_entropy.api import LossAndLse, linear_cross_entropy
from lminf.kernels.cross_entropy.sharded import sharded_linear_cross_entropy
from lminf.kernels.decode.api import lambda_decode
from lminf.kernels.decode.cache import RollingCache
from lminf.kernels.decode.operands import DecodeResiduals
from lminf.kernels.lambda_attention.api import lambda_attention
from lminf.kernels.lambda_attention.operands import Residuals

__all__ = [
    "Decision",
    "DecodeResiduals",
    "GlobalDistance",
    "LossAndLse",
    "Residuals",
    "RollingCache",
    "SegmentIds",
    "block_sparse_attention",
    "explain",
    "lambda_attention",
    "lambda_decode",
    "linear_cross_entropy",
    "sharded_linear_cross_entropy",
]
