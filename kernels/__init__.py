"""Attention and loss kernels: arrays in, arrays out. Imports nothing of lminf."""

from kernels.block_sparse.api import block_sparse_attention
from kernels.common.dispatch import Decision, explain
from kernels.common.masks import GlobalDistance, SegmentIds
from kernels.common.rope import LambdaOperands, rope_lambda
from kernels.cross_entropy.api import LossAndLse, linear_cross_entropy
from kernels.cross_entropy.sharded import sharded_linear_cross_entropy
from kernels.decode.api import lambda_decode
from kernels.decode.cache import RollingCache
from kernels.decode.operands import DecodeResiduals
from kernels.lambda_attention.api import lambda_attention
from kernels.lambda_attention.operands import Residuals

__all__ = [
    "Decision",
    "DecodeResiduals",
    "GlobalDistance",
    "LambdaOperands",
    "LossAndLse",
    "Residuals",
    "RollingCache",
    "SegmentIds",
    "block_sparse_attention",
    "explain",
    "lambda_attention",
    "lambda_decode",
    "linear_cross_entropy",
    "rope_lambda",
    "sharded_linear_cross_entropy",
]
