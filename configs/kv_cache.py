"""Quality, memory and time of smaller caches, by policy.

Topic      cost
Question   At a given size of the cache in bytes, which policy has the least loss and retrieves
           most?
Paper      SirLLM (arXiv:2405.12528), H2O (arXiv:2306.14048), TOVA (arXiv:2401.06104), SnapKV
           (arXiv:2404.14469), ThinK (arXiv:2407.21018); beside LM-Infinite and StreamingLLM
Command    python -m experiments.kv_cache
Time       10 minutes on two CPU cores; the same command with the same --out resumes
Expected   with 256 of 1,024 tokens SnapKV is 0.05 nats above Full, and the policies that evict
           while reading are 0.25 to 0.32 above. SirLLM finds 18 of 20 keys with 128 tokens and all
           with 256. SnapKV finds 2: its last 32 tokens, mostly filler, vote against the digits
           after the first (with window=8 it finds as many as SirLLM). ThinK at 0.4 finds all with a
           fifth fewer bytes
Tiny       --config=:tiny first trains a byte model at 64 tokens, which retrieves nothing
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"
    # One entry a cell: {c} is each of the capacities (tokens), {w} the same less the sinks and the
    # query, {h} a quarter of it.
    c.policies = (
        "full",
        "streaming:window={w},sinks=4",
        "lm_infinite:window={w},sinks=4",
        "sirllm:capacity={c},recent={h},turn={h}",
        "h2o:capacity={c},recent={h},turn={h}",
        "tova:capacity={c},turn={h}",
        "snapkv:capacity={c}",
        "snapkv:capacity={c},window=8",
        "think:ratio=0.4,capacity={c}",
        "think:ratio=0.4",
        "think:ratio=0.7",
    )
    c.capacities = (128, 256)
    c.prompt, c.continuation = 1024, 256  # tokens of the default text: read, and then predicted
    c.passkey_length, c.passkeys = 700, 20  # tokens of a prompt, and prompts at random depths
    c.positions = (1024, 4096, 16384)  # tokens of the stream before the steps timed
    c.unbounded_to = 4096  # tokens, of policies that keep something of every token
    c.steps = 8  # tokens timed in every cell, after one that compiles
    if arg == "tiny":
        c.model = "tiny"
        c.capacities = (48,)
        c.policies = (
            "full",
            "streaming:window={w},sinks=4",
            "sirllm:capacity={c},recent={h},turn={h}",
            "h2o:capacity={c},recent={h},turn={h}",
            "think:ratio=0.4,recent=8,capacity={c}",
        )
        c.prompt, c.continuation = 128, 64
        c.passkey_length, c.passkeys = 400, 2
        c.positions, c.unbounded_to, c.steps = (100, 5000), 100, 3
    return c
