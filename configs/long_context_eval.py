"""Retrieval from outside the window: policies that select by content, and those that do not.

Topic      context
Question   Which policies use tokens that have left the window, at equal numbers of attended tokens?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137); InfLLM (Xiao et al. 2024,
           arXiv:2402.04617)
Command    python -m experiments.long_context_eval
Time       about an hour on two CPU cores, mostly prefill of the long prompts; the same command with
           the same --out resumes
Expected   InfLLM and reading in segments find every key in 16,384 tokens; LM-Infinite and
           StreamingLLM find none that has left the window; LM-Infinite with top-k, placed 8 tokens
           away, finds 11 of 18. These rows asked for the same two keys at every depth, and for
           lines of the same three lists, so their intervals are too narrow; cells have keys of
           their own since. No policy retrieves values by their keys in 4,096 tokens:
           long_context_retrieval measures what it knows of them
Long       --config=:long uses prompts of 32,768 tokens: InfLLM finds 20 of 20 keys, top-k 7 of 18,
           LM-Infinite and StreamingLLM none outside their windows; an hour
All        --config=:all compares ten methods at 4,096 tokens with 1,034 attended tokens. SirLLM,
           top-k, InfLLM and segments find all keys outside their windows; top-k placed as in the
           paper, half a window away, finds 4 of 24, TOVA 7, H2O and InfiniteHiP none; half an hour
Loss       --config=:loss reads 32,768 tokens under policies that extend beyond the training length,
           with about 4,106 attended tokens where a policy selects. Past 8,192 tokens all are on
           average at most 0.02 nats above re-reading, and only LongHeads is 0.1 above it in some
           block. What Self-Extend, ReRoPE and InfiniteHiP gain on it is one passage: 65 % of the
           tokens from 26,624 to 28,672 end an exact copy of 17 tokens from farther back than a
           window. Top-k has no loss: it selects for the last query of a call alone; 50 minutes
Tiny       --config=:tiny trains a byte model at 64 tokens, which retrieves nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "long", "all", "loss")

# Each attends to 2,058 tokens or a few more.
FORGETS = ("lm_infinite:window=2048,sinks=10", "streaming:window=2048,sinks=10")
LOOKS_UP = (
    "topk:window=2048,sinks=10,topk=20,at=8",
    "infllm:window=1024,sinks=10,topk=16,block=64",
)
# To 1,034 or a few more.
ALL = (
    "lm_infinite:window=1024,sinks=10",
    "streaming:window=1024,sinks=10",
    "topk:window=1024,sinks=10,topk=20,at=8",
    "topk:window=1024,sinks=10,topk=20",
    "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256",
    "infinite_hip:topk=(2048,1024,512),window=512,sinks=10",
    "sirllm:capacity=1024,sinks=10,recent=512,turn=256",
    "h2o:capacity=1024,sinks=10,recent=512,turn=256",
    "tova:capacity=1024,sinks=10,turn=256",
    "segments:segment_len=960,question_len=32,head_len=48,select=(TopK:count=1)",
)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"  # prompted raw, not through its chat template
    c.generator = "landmark"  # or lm_infinite: lminf.evals.passkey says how they differ
    c.lengths = (16_384,)  # tokens of the whole prompt
    c.prompts = (2,)  # passkeys of each length, at each depth
    c.depths = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    c.key_value_lengths = (4096,)
    c.key_value_prompts = (2,)  # lists, of each of which one line is asked for, at each depth
    c.key_value_depths = c.depths
    c.policies = (
        *FORGETS,
        *LOOKS_UP,
        "segments:segment_len=1984,question_len=32,head_len=48,select=(TopK:count=1)",
    )
    c.text = ""  # a file to measure the loss on; empty: the default text
    c.nll_length = 16_384  # tokens; 0: no loss is measured
    c.block = 2048  # positions averaged over
    if arg == "long":
        c.lengths, c.nll_length = (32_768,), 0
        c.key_value_lengths = c.key_value_prompts = ()
        c.policies = (*FORGETS, *LOOKS_UP)
    if arg == "all":
        c.lengths, c.prompts, c.policies, c.nll_length = (4096,), (3,), ALL, 0
        c.key_value_lengths = c.key_value_prompts = ()
    if arg == "loss":
        c.lengths = c.prompts = c.key_value_lengths = c.key_value_prompts = ()
        c.policies = (
            "lm_infinite:window=4096,sinks=10",
            "streaming:window=4096,sinks=10",
            "infllm:window=2048,sinks=10,topk=16",
            "sirllm:capacity=4096,sinks=10,recent=2048,turn=512",
            "tova:capacity=4096,sinks=10,turn=512",
            "h2o:capacity=4096,sinks=10,recent=2048,turn=512",
            "self_extend:window=4096,group=8",
            "rerope:window=4096",
            "leaky_rerope:window=4096,stretch=8",
            "longheads:attended=4096",
            "infinite_hip:topk=(16384,8192,2048),window=2048,sinks=10",
        )
        c.nll_length = 32_768
    if arg == "tiny":
        c.model = "tiny"
        c.lengths, c.prompts, c.depths = (400, 700), (2, 2), (0.1, 0.9)
        c.key_value_lengths, c.key_value_prompts, c.key_value_depths = (500,), (2,), (0.5,)
        c.policies = (
            "lm_infinite:window=64,sinks=4",
            "streaming:window=64,sinks=4",
            "topk:window=64,sinks=4,topk=5,from_layer=1",
            "infllm:window=32,sinks=4,topk=4,block=8,exec_block=16",
        )
        c.nll_length, c.block = 512, 64
    return c
