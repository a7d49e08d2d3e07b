"""What policies keep of tokens that have left every window, against what they cost.

Topic      context
Question   How much of what was read far back does each policy keep, at equal attended tokens?
Paper      LM-Infinite (Han et al. 2024, arXiv:2308.16137); InfLLM (Xiao et al. 2024,
           arXiv:2402.04617); RULER (Hsieh et al. 2024, arXiv:2404.06654), for the key-value needles
Data       apt install anarchism, for prose; --config.text=code needs nothing
Command    python -m experiments.long_context_retrieval
Time       not measured as a whole: for a machine with more than two cores. :short took 35 s a
           document for LM-Infinite, 57 s for InfLLM and 74 s for Full on two cores of an Intel Xeon
           beside other work. The same command with the same --out resumes
Expected   at 4,096 tokens of prose LM-Infinite keeps nothing that left its window, which shows in
           margins of 0 and a rank of chance; InfLLM with as many attended tokens keeps a third of
           the copy gain of full attention
Short      --config=:short reads 4,096 tokens under three policies, 12 documents x 8 depths: copy
           gain 0.17 (0.10 to 0.25) nats/token for LM-Infinite, which is what its window tells of
           the topic, 0.99 (0.82 to 1.16) for InfLLM and 2.79 (2.62 to 2.96) for Full; key-value
           margin 0.00 (-0.03 to 0.04), 0.54 (0.24 to 0.81) and 2.21 (1.83 to 2.69) nats
Tiny       --config=:tiny trains a byte model at 64 tokens, which retrieves nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "short")
FULL = "full"
FORGETS = "lm_infinite:window=1024,sinks=10"
SELECTS = "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256"
# Of bounded memory: they keep 1,034 tokens.
KEEPS_SOME = (
    FORGETS,
    "streaming:window=1024,sinks=10",
    "lambda:window=1024,sinks=10",
    "window:window=1034",
    "sirllm:capacity=1034,sinks=10,recent=512,turn=256",
    "tova:capacity=1034,sinks=10,turn=256",
    "h2o:capacity=1034,sinks=10,recent=512,turn=256",
    "snapkv:capacity=1034",
)
# They keep every token and attend to 1,034 of them or a few fewer.
SELECTS_SOME = (
    SELECTS,
    "topk:window=1004,sinks=10,topk=20,at=8",
    "longheads:attended=1024",
    "hip:window=512,sinks=10,topk=512",
    "infinite_hip:topk=(2048,1024,512),window=512,sinks=10",
    "moba:block=128,topk=8",
)
# They attend to every token.
SEES_ALL = (
    FULL,
    "rerope:window=1024",
    "leaky_rerope:window=1024,stretch=8",
    "self_extend:window=1024,group=8",
    "think:ratio=0.4",
)


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"  # or a .gguf file, such as one of Qwen2.5
    c.dtype = "bfloat16"  # of weights, activations and caches
    c.text = "/usr/share/doc/anarchism/markdown/sec*.md.gz"  # code, or files, a document each
    c.lengths = (4096, 16_384)  # tokens of a document
    c.documents = 12  # of each length; two are each other's control
    # Shares of the document before each sentence. Up to 16,384 tokens the last one is inside a
    # window of 1,024, to compare with.
    c.depths = (0.04, 0.13, 0.22, 0.31, 0.40, 0.49, 0.58, 0.67, 0.94)
    c.beyond = 1034  # tokens: what is farther back is outside every window
    c.policies = KEEPS_SOME + SELECTS_SOME + SEES_ALL
    if arg == "short":
        c.lengths, c.policies = (4096,), (FORGETS, SELECTS, FULL)
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
