"""Attention; importing the package makes every policy known by its name."""

from lminf.attention.policies import block_topk as block_topk
from lminf.attention.policies import eviction as eviction
from lminf.attention.policies import hip as hip
from lminf.attention.policies import infllm as infllm
from lminf.attention.policies import longheads as longheads
from lminf.attention.policies import prompt_compression as prompt_compression
from lminf.attention.policies import topk as topk
