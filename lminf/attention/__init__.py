"""Attention; importing the package makes every policy known by its name."""

from lminf.attention import condense as condense
from lminf.attention import evict as evict
from lminf.attention import hip as hip
from lminf.attention import infinite_hip as infinite_hip
from lminf.attention import infllm as infllm
from lminf.attention import longheads as longheads
from lminf.attention import top_k as top_k
