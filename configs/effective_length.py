"""How far each policy answers, task by task of the evaluation suite.

Topic      context
Question   Up to which prompt length does each policy answer as well as it answers short prompts, on
           tasks of narrow and wide scope whose facts are easy and hard to find?
Paper      Goldman et al. 2024 (arXiv:2407.00402) for scope and diffusion; lminf.evals.suites names
           the source of each task
Command    python -m experiments.effective_length
Time       not measured; it reads 3.7 million tokens, which take hours on two CPU cores, and the
           same command with the same --out resumes
Expected   not measured. `lminf eval` chooses tasks, model, policies and lengths
Short      --config=:short asks SmolLM2-135M in bfloat16 for one of five numbers in prose, 10 texts
           of each length and 5 questions of each: full attention answers 0.54 at 1,024 tokens
           (0.37 to 0.70), 0.50 at 2,048 (0.37 to 0.63) and 0.24 at 4,096 (0.14 to 0.37),
           LM-Infinite with a window of 2,048 0.56, 0.52 and 0.18 (0.08 to 0.35). The two cannot be
           told apart: most of the loss at 4,096 is the model's own
Tiny       --config=:tiny trains a byte model at 64 tokens, which answers nothing: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=("tiny", "short"))
    c.model = "smollm2-135m-instruct"
    c.dtype = "bfloat16"  # of weights, activations and caches
    c.chat = False  # True: prompts are messages of a user, in the model's chat template
    # Names of `lminf eval --list`, one of each quarter of scope and diffusion. A model that cannot
    # answer freely may choose: of 5 numbers, 6 places, 8 words.
    c.tasks = (
        "niah_multikey:depth=0.5,keys=5,questions=5,answers=likeliest",
        "babilong:facts=1,questions=6,answers=likeliest",
        "niah_multivalue:values=2,questions=5",
        "common_words:common=1,answers=likeliest",
    )
    c.lengths = (1024, 2048, 4096, 8192, 16_384, 32_768)  # tokens of the whole prompt
    c.instances = 50  # of each task at each level and length
    c.policies = (  # all but Full attend to 1,034 tokens or a few fewer
        "full",
        "lm_infinite:window=1024,sinks=10",
        "infllm:window=512,sinks=10,topk=8,block=64,exec_block=256",
        "streaming:window=1024,sinks=10",
        "h2o:capacity=1034,sinks=10,recent=512,turn=256",
        "longheads:attended=1024",
        "infinite_hip:topk=(2048,1024,512),window=512,sinks=10",
    )
    if arg == "short":
        c.lengths, c.policies = c.lengths[:3], c.policies[:3]
    if arg == "tiny":
        c.model, c.dtype = "tiny", "float32"
        c.tasks = ("single_needle:depth=0.0", "single_needle:depth=1.0", "m4le:ability=global")
        c.lengths, c.instances = (400, 800), 2
        c.policies = ("full", "lm_infinite:window=64,sinks=4")
    return c
