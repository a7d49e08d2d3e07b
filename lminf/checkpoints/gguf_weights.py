"""Parameter maps of GGUF files, by llama.cpp's names of architectures."""

from lminf.checkpoints.weight_maps import Row, norm, row

_ENDS = [
    row("token_embd.weight", "embed", "v d"),
    row("output.weight", "head", "v d"),
]
_MLP = [
    row("blk.{}.ffn_gate.weight", "layers/mlp/w_gate", "f d -> d f"),
    row("blk.{}.ffn_up.weight", "layers/mlp/w_up", "f d -> d f"),
    row("blk.{}.ffn_down.weight", "layers/mlp/w_down", "d f -> f d"),
    row("blk.{}.ffn_gate.bias", "layers/mlp/b_gate", "f"),
    row("blk.{}.ffn_up.bias", "layers/mlp/b_up", "f"),
    row("blk.{}.ffn_down.bias", "layers/mlp/b_down", "d"),
]
_JOINED_MLP = [
    row("blk.{}.ffn_up.weight", "layers/mlp/{w_gate,w_up}", "(two f) d -> two d f"),
    row("blk.{}.ffn_down.weight", "layers/mlp/w_down", "d f -> f d"),
]
_EXPERTS = [
    row("blk.{}.ffn_gate_inp.weight", "layers/moe/router", "e d -> d e"),
    row("blk.{}.ffn_gate_exps.weight", "layers/moe/gate", "e m d -> e d m"),
    row("blk.{}.ffn_up_exps.weight", "layers/moe/up", "e m d -> e d m"),
    row("blk.{}.ffn_down_exps.weight", "layers/moe/down", "e d m -> e m d"),
]
_NORMS = [
    *norm("blk.{}.attn_norm", "layers/attention_norm"),
    *norm("blk.{}.ffn_norm", "layers/mlp_norm"),
    *norm("output_norm", "final_norm"),
]
_POST_NORMS = [
    *norm("blk.{}.post_attention_norm", "layers/attention_post_norm"),
    *norm("blk.{}.post_ffw_norm", "layers/mlp_post_norm"),
]
_OUT = [
    row("blk.{}.attn_output.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("blk.{}.attn_output.bias", "layers/attention/bo", "d"),
]
_VALUES = [
    row("blk.{}.attn_v.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row("blk.{}.attn_v.bias", "layers/attention/bv", "(k h) -> k h"),
    *_OUT,
]
_QK = [
    row("blk.{}.attn_q.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row("blk.{}.attn_k.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row("blk.{}.attn_q.bias", "layers/attention/bq", "(n h) -> n h"),
    row("blk.{}.attn_k.bias", "layers/attention/bk", "(k h) -> k h"),
]
# For these architectures llama.cpp stores the two channels of each rotated pair side by side
# (p two); our tree, like Hugging Face, has all first channels and then all second ones (two p).
_QK_PAIRED = [
    row("blk.{}.attn_q.weight", "layers/attention/wq", "(n p two) d -> d n (two p)"),
    row("blk.{}.attn_k.weight", "layers/attention/wk", "(k p two) d -> d k (two p)"),
    row("blk.{}.attn_q.bias", "layers/attention/bq", "(n p two) -> n (two p)"),
    row("blk.{}.attn_k.bias", "layers/attention/bk", "(k p two) -> k (two p)"),
]
_QKV = [  # as many key heads as query heads
    row("blk.{}.attn_qkv.weight", "layers/attention/{wq,wk,wv}", "(three n h) d -> three d n h"),
    row("blk.{}.attn_qkv.bias", "layers/attention/{bq,bk,bv}", "(three n h) -> three n h"),
    *_OUT,
]
_GROUPED_QKV = [
    row(
        "blk.{}.attn_qkv.weight",
        "layers/attention/{wq,wk,wv}",
        "(n* h) d -> d n h + (k* h) d -> d k h + (k* h) d -> d k h",
    ),
    *_OUT,
]


def _qk_norm(axes_q: str, axes_k: str, place: str, offset: float = 0.0) -> list[Row]:
    """Norms of queries and keys, whose places are `{}_norm` or `{}_head_norms`."""
    return [
        row(
            f"blk.{{}}.attn_{letter}_norm.weight",
            f"layers/attention/{place.format(letter)}/scale",
            axes,
            offset,
        )
        for letter, axes in (("q", axes_q), ("k", axes_k))
    ]


_LLAMA = [*_ENDS, *_NORMS, *_QK_PAIRED, *_VALUES, *_MLP]
_PLAIN = [*_ENDS, *_NORMS, *_QK, *_VALUES, *_MLP, *_qk_norm("h", "h", "{}_norm")]
_HEAD_NORMS = _qk_norm("n h", "k h", "{}_head_norms")
_COHERE = [*_ENDS, *_NORMS, *_QK, *_VALUES, *_MLP, *_HEAD_NORMS]


def _gemma(*extra: Row) -> list[Row]:
    """llama.cpp adds the 1 that Gemma's norms add when they run."""
    rows = [*_ENDS, *_NORMS, *_POST_NORMS, *_QK, *_VALUES, *_MLP, *extra]
    return [r._replace(offset=1.0) if r.places[0].endswith("/scale") else r for r in rows]


_EXPERT_BIASES = [
    row("blk.{}.ffn_gate_inp.bias", "layers/moe/b_router", "e"),
    row("blk.{}.ffn_gate_exps.bias", "layers/moe/b_gate", "e m"),
    row("blk.{}.ffn_up_exps.bias", "layers/moe/b_up", "e m"),
    row("blk.{}.ffn_down_exps.bias", "layers/moe/b_down", "e d"),
]
# Falcon's norm of the MLP comes first where there are two.
FALCON_TWO_NORMS = [
    *norm("blk.{}.attn_norm_2", "layers/attention_norm"),
    *norm("blk.{}.attn_norm", "layers/mlp_norm"),
]
TABLES: dict[str, list[Row]] = {
    "llama": [*_LLAMA, *_EXPERTS],
    "mistral3": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": [*_PLAIN, *_EXPERTS],
    "gemma": _gemma(),
    "gemma2": _gemma(),
    "gemma3": _gemma(*_qk_norm("h", "h", "{}_norm")),
    "olmo2": [
        *_ENDS, *_QK, *_VALUES, *_MLP, *_POST_NORMS, *norm("output_norm", "final_norm"),
        *_qk_norm("(n h) -> n h", "(k h) -> k h", "{}_head_norms"),
    ],
    "phi3": [*_ENDS, *_NORMS, *_GROUPED_QKV, *_JOINED_MLP],
    "glm4": [*_ENDS, *_NORMS, *_POST_NORMS, *_QK, *_VALUES, *_JOINED_MLP],
    "stablelm": _COHERE,
    "command-r": _COHERE,
    "cohere2": _COHERE,
    "gpt-oss": [
        *_ENDS, *_QK, *_VALUES, *_EXPERTS, *_EXPERT_BIASES, *norm("output_norm", "final_norm"),
        *norm("blk.{}.attn_norm", "layers/attention_norm"),
        *norm("blk.{}.post_attention_norm", "layers/mlp_norm"),
        row("blk.{}.attn_sinks.weight", "layers/attention/sinks", "n"),
    ],
    "gptneox": [*_ENDS, *_NORMS, *_MLP, *_QKV],
    "gpt2": [*_ENDS, *_NORMS, *_MLP, *_QKV, row("position_embd.weight", "positions", "r d")],
    "mpt": [*_ENDS, *_NORMS, *_MLP, *_QKV],
    "bloom": [*_ENDS, *_NORMS, *_MLP, *_QKV, *norm("token_embd_norm", "embed_norm")],
    "falcon": [
        *_ENDS, *_MLP, *_GROUPED_QKV, *norm("output_norm", "final_norm"),
        *norm("blk.{}.attn_norm", "layers/attention_norm"),
    ],
}  # fmt: skip


def rows_of(architecture: str, residual: str) -> list[Row]:
    """The map of an architecture; of Falcon, by how its layers add up."""
    rows = TABLES[architecture]
    if architecture != "falcon" or residual == "parallel_shared":
        return rows
    return [r for r in rows if "attn_norm" not in r.name] + FALCON_TWO_NORMS
