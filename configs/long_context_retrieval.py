"""What policies keep of tokens that have left every window, against what they cost.

Topic      context
Question   How much of what was read far back does each policy keep, at equal attended tokens and at
           equal memory?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137); InfLLM (Xiao et al. 2024,
           arXiv:2402.04617); RULER (Hsieh et al. 2024, arXiv:2404.06654), for the key-value needles
Data       apt install anarchism, for prose; --config.text=code needs nothing
Command    python -m experiments.long_context_retrieval
Time       two to three hours of processor time on an AMD EPYC (Zen 5), not measured as a whole: the
           committed rows are of a process for each core, with some of the policies each, beside
           other work. The same command with the same --out resumes
Expected   copy gains in nats/token, n = 12 documents, after 4,096 and 16,384 tokens, twice the
           length at which SmolLM2 was trained. Full attention keeps 2.80 (2.63 to 2.97) and 0.11
           (-0.14 to 0.34); ReRoPE, which also sees all, 2.83 (2.71 to 2.94) and 2.15 (1.95 to
           2.34). Of those that keep all and attend to 1,034, InfiniteHiP keeps 2.24 (2.05 to 2.42)
           and 1.14 (1.00 to 1.33), InfLLM 0.99 (0.83 to 1.17) and 0.62 (0.42 to 0.83); with memory
           for 1,034 LM-Infinite 0.17 (0.10 to 0.25), what its window tells of the topic, and 0.11
           (0.00 to 0.22), SirLLM 0.39 (0.28 to 0.49) and 0.13 (0.05 to 0.22)
Short      --config=:short reads 4,096 tokens under 19 policies, in under an hour of processor time.
           HiP, whose first three layers attend to all, keeps as much as full attention: 2.75 (2.55
           to 2.95). Top-k attention, placed 8 tokens away, loses what is inside its window: a
           needle margin of -0.06 (-1.14 to 1.13) nats there, where LM-Infinite has 10.66 (10.03 to
           11.30)
Qwen       --config=:qwen asks Qwen2.5-Coder-0.5B-Instruct, trained at 32,768 tokens, from a file of
           4-bit weights in the current folder, n = 8 documents of 4,096 tokens: copy gain 0.05
           (-0.13 to 0.22) for LM-Infinite, 2.72 (2.36 to 3.21) for InfLLM, 3.89 (3.75 to 4.05) for
           full attention; key-value margin 0.00 (-0.03 to 0.02), 1.92 (1.48 to 2.36) and 7.17 (6.48
           to 8.02) nats
Tiny       --config=:tiny trains a byte model at 64 tokens, which retrieves nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short", "qwen")
# Of bounded memory: they keep 1,034 tokens.
FORGETS = "lm_infinite:window=1024,sinks=10"
SIRLLM = "sirllm:capacity=1034,sinks=10,recent=512,turn=256"
SNAPKV = "snapkv:capacity=1034"
KEEP_SOME = (
    FORGETS,
    "streaming:window=1024,sinks=10",
    "lambda:window=1024,sinks=10",
    "window:window=1034",
    SIRLLM,
    "tova:capacity=1034,sinks=10,turn=256",
    "h2o:capacity=1034,sinks=10,recent=512,turn=256",
    SNAPKV,
)
# They keep every token and attend to 1,034 of them or a few fewer.
INFLLM = "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256"
TOPK = "topk:window=1004,sinks=10,topk=20,at=8"
INFINITE_HIP = "infinite_hip:topk=(2048,1024,512),window=512,sinks=10"
SELECT_SOME = (
    INFLLM,
    TOPK,
    "longheads:attended=1024",
    "hip:window=512,sinks=10,topk=512",
    INFINITE_HIP,
    "moba:block=128,topk=8",
)
# They attend to every token.
SEE_ALL = (
    "full",
    "rerope:window=1024",
    "leaky_rerope:window=1024,stretch=8",
    "self_extend:window=1024,group=8",
    "think:ratio=0.4",
)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.dtype = "bfloat16"  # of weights, activations and caches
    c.text = "/usr/share/doc/anarchism/markdown/sec*.md.gz"  # code, or files, a document each
    c.lengths = (4096, 16_384)  # tokens of a document
    c.documents = 12  # of each length; two are each other's control
    # Shares of the document before each sentence. Up to 16,384 tokens the last one is inside a
    # window of 1,024, to compare with.
    c.depths = (0.04, 0.13, 0.22, 0.31, 0.40, 0.49, 0.58, 0.67, 0.94)
    c.beyond = 1034  # tokens: what is farther back is outside every window
    c.policies = (FORGETS, SIRLLM, SNAPKV, INFLLM, TOPK, INFINITE_HIP, *SEE_ALL[:2])
    if arg == "short":
        c.lengths, c.policies = (4096,), KEEP_SOME + SELECT_SOME + SEE_ALL
    if arg == "qwen":
        c.model = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"  # a file in the folder it is run in
        c.lengths, c.policies, c.documents = (4096,), (FORGETS, INFLLM, "full"), 8
    if arg == "tiny":
        c.model, c.text, c.dtype = "tiny", "code", "float32"
        c.lengths, c.documents, c.depths = (512,), 2, (0.1, 0.4, 0.8)
        c.beyond = 64
        c.policies = (
            "full",
            "lm_infinite:window=64,sinks=4",
            "sirllm:capacity=64,sinks=4,recent=16,turn=16",
            "infllm:window=32,sinks=4,topk=4,block=8,exec_block=16",
        )
    return c
