"""How far each policy answers, task by task of the evaluation suite.

Topic      context
Question   Up to which prompt length does each policy answer as well as it answers short prompts, on
           tasks of narrow and wide scope whose facts are easy and hard to find?
Paper      Goldman et al. 2024 (arXiv:2407.00402) for scope and diffusion; lminf.evals.suites names
           the source of each task
Command    python -m experiments.effective_length
Time       two hours of one core of an AMD EPYC (Zen 5): 6,900 s by the rows, beside other work. The
           committed rows are of a process for each core, with some of the policies each. The same
           command with the same --out resumes
Expected   SmolLM2-135M names the right one of five numbers in prose (chance 0.2; 50 questions about
           10 texts a cell). Full attention has 0.48 (0.34 to 0.62) at 2,048 tokens, 0.30 (0.19 to
           0.44) at 8,192, where it was trained, and 0.20 (0.11 to 0.33) at 16,384; ReRoPE, which
           also sees all, has 0.38 (0.25 to 0.53) there. With 1,034 attended tokens none is told
           apart from chance from 4,096 on: InfiniteHiP has 0.42 (0.29 to 0.56) at 2,048 and 0.24
           (0.14 to 0.37) at 4,096, InfLLM 0.26 (0.16 to 0.40) and 0.20 (0.11 to 0.33), LM-Infinite
           0.28 (0.17 to 0.42) and 0.26 (0.16 to 0.40)
Policies   --config=:policies asks SmolLM2 under 11 policies at 4,096 tokens, in 45 minutes of one
           core. Those that attend to all have 0.40 to 0.50 (0.28 to 0.63), those that attend to
           1,034 tokens 0.20 to 0.26 (0.11 to 0.40), and HiP, whose first three layers attend to
           all, 0.28 (0.17 to 0.42)
Qwen       --config=:qwen asks Qwen2.5-Coder-0.5B-Instruct, trained at 32,768 tokens, from a file of
           4-bit weights in the current folder, in 26 minutes of one core. At 1,024 tokens all
           answers are right, 1.00 (0.72 to 1.00). At 4,096 they are under full attention; with
           1,034 attended tokens InfiniteHiP has 0.64 (0.50 to 0.76), LM-Infinite 0.28 (0.17 to
           0.42) and InfLLM 0.26 (0.16 to 0.40), which is chance
Short      --config=:short asks SmolLM2-135M four tasks, one of each quarter of scope and diffusion,
           up to 4,096 tokens under full attention and LM-Infinite with a window of 1,024, in 50
           minutes of one core of an AMD EPYC beside other work. What has left the window is not
           answered: of five numbers the right one at 2,048 tokens 0.28 (0.17 to 0.42) and at 4,096
           0.26 (0.16 to 0.40), where chance is 0.2 and full attention has 0.48 (0.34 to 0.62) and
           0.50 (0.37 to 0.63); all numbers of a key 0.08 (0.03 to 0.14) for 0.20 (0.13 to 0.26) at
           4,096. On facts in prose (chance 0.17) and common words (chance 0.13) the two are not
           told apart
Tiny       --config=:tiny trains a byte model at 64 tokens, which answers nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.long_context_retrieval import FORGETS, INFINITE_HIP, INFLLM, SIRLLM

VARIANTS = ("tiny", "short", "policies", "qwen")
MULTIKEY = "niah_multikey:depth=0.5,keys=5,questions=5,answers=likeliest"


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.dtype = "bfloat16"  # of weights, activations and caches
    c.chat = False  # True: prompts are messages of a user, in the model's chat template
    # Names of `lminf eval --list`. A model that cannot answer freely may choose: of 5 numbers.
    c.tasks = (MULTIKEY,)
    c.lengths = (2048, 4096, 8192, 16_384)  # tokens of the whole prompt
    c.instances = 50  # of each task at each level and length
    c.policies = ("full", "rerope:window=1024", INFINITE_HIP, INFLLM, FORGETS)
    if arg == "short":  # one task of each quarter of scope and diffusion
        c.tasks = (
            MULTIKEY,
            "babilong:facts=1,questions=6,answers=likeliest",
            "niah_multivalue:values=2,questions=5",
            "common_words:common=1,answers=likeliest",
        )
        c.lengths, c.policies = (1024, 2048, 4096), ("full", FORGETS)
    if arg == "policies":
        c.lengths = (4096,)
        c.policies = (
            *c.policies,
            "self_extend:window=1024,group=8",
            "hip:window=512,sinks=10,topk=512",
            "longheads:attended=1024",
            "h2o:capacity=1034,sinks=10,recent=512,turn=256",
            SIRLLM,
            "streaming:window=1024,sinks=10",
        )
    if arg == "qwen":
        c.model = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"  # a file in the folder it is run in
        c.lengths, c.policies = (1024, 4096), ("full", INFINITE_HIP, INFLLM, FORGETS)
    if arg == "tiny":
        c.model, c.dtype = "tiny", "float32"
        c.tasks = ("single_needle:depth=0.0", "single_needle:depth=1.0", "m4le:ability=global")
        c.lengths, c.instances = (400, 800), 2
        c.policies = ("full", "lm_infinite:window=64,sinks=4")
    return c
