"""What a smaller cache costs in quality, and saves in bytes and time, by policy.

Question   With so many bytes of keys and values, which policy predicts and remembers best?
Paper      SirLLM (arXiv:2405.12528), H2O (arXiv:2306.14048), TOVA (arXiv:2401.06104),
           SnapKV (arXiv:2404.14469), ThinK (arXiv:2407.21018); beside LM-Infinite and StreamingLLM
Command    python -m experiments.kv_cache
Time       not measured on an idle machine; a cell of quality reads 6,880 tokens, and there are 17
Expected   not measured yet
Tiny       --config=:tiny trains a byte model at 64 tokens first, which answers nothing
"""

from configs import base


def get_config(arg: str = ""):
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
        "think:ratio=0.4,capacity={c}",
        "think:ratio=0.4",
        "think:ratio=0.7",
    )
    c.capacities = (128, 256)
    c.prompt, c.continuation = 1024, 256  # tokens of the default text: read, and then predicted
    c.passkey_length, c.passkeys = 700, 8  # tokens of a prompt, and prompts at random depths
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
