"""Time per token and memory of decoding, by number of preceding tokens.

Topic      cost
Question   What does the next token cost after 1,000 tokens, and after 100,000?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137), efficiency; StreamingLLM (Xiao et al.
           2023, arXiv:2309.17453)
Command    python -m experiments.decode_cost
Time       about 2 minutes on two CPU cores
Expected   with a window of 4,096, the token after 100,000 costs as much as the token after 5,000
           (69 ms both); Full costs more than twice as much at 16,384 as at 4,096
Choosing   --config=:choosing times the policies by content, with about 1,024 attended tokens, after
           1,024 to 32,768 tokens, in 2 minutes. From 4,096 to 32,768 tokens InfLLM slows down by a
           quarter, LongHeads and InfiniteHiP by a tenth, the evicting policies not at all. Full
           takes 3.2 times as long, top-k, which scores every key, 2.1 times, and HiP 2.2 times: it
           searches for every token here, and its first three layers are dense
Tiny       --config=:tiny first trains a byte model at 64 tokens: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "choosing")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.positions = (1024, 4096, 5000, 16384, 100_000)  # tokens already read
    c.policies = (
        "full",
        "lm_infinite:window=4096,sinks=10",
        "streaming:window=4096,sinks=10",
    )
    c.unbounded_to = 16384  # tokens: at 100,000 a cache that keeps everything takes 4.6 GB
    c.steps = 24  # tokens timed in every cell, after one that compiles
    c.chunk = 512  # tokens of the prompt whose reading is timed, the better of two; 0: none is
    if arg == "choosing":
        c.positions, c.steps = (1024, 4096, 16_384, 32_768), 12
        c.unbounded_to, c.chunk = 32_768, 0
        c.policies = (
            "full",
            "lm_infinite:window=1024,sinks=10",
            "topk:window=1024,sinks=10,topk=5",
            "infllm:window=512,sinks=10,topk=8,block=64",
            "longheads:attended=1024",
            "hip:topk=512,window=512,sinks=10,refresh=1",
            "infinite_hip:topk=(4096,2048,512),window=512,sinks=10",
            "sirllm:capacity=1024,recent=256",
            "h2o:capacity=1024,recent=256",
            "tova:capacity=1024",
        )
    if arg == "tiny":
        c.model = "tiny"
        c.positions, c.unbounded_to = (100, 500, 100_000), 500
        c.policies = ("full", "lm_infinite:window=64,sinks=4", "streaming:window=60,sinks=4")
        c.steps, c.chunk = 16, 64
    return c
