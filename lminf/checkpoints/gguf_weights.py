"""Parameter maps of GGUF files, by llama.cpp's names of architectures."""

from lminf.checkpoints.weight_maps import Row, norm, row

_GGUF_ENDS = [
    row("token_embd.weight", "embed", "v d"),
    row("output.weight", "head", "v d"),
]
_GGUF_MLP = [
    row("blk.{}.ffn_gate.weight", "layers/mlp/w_gate", "f d -> d f"),
    row("blk.{}.ffn_up.weight", "layers/mlp/w_up", "f d -> d f"),
    row("blk.{}.ffn_down.weight", "layers/mlp/w_down", "d f -> f d"),
    row("blk.{}.ffn_gate.bias", "layers/mlp/b_gate", "f"),
    row("blk.{}.ffn_up.bias", "layers/mlp/b_up", "f"),
    row("blk.{}.ffn_down.bias", "layers/mlp/b_down", "d"),
]
_GGUF_NORMS = [
    *norm("blk.{}.attn_norm", "layers/attention_norm"),
    *norm("blk.{}.ffn_norm", "layers/mlp_norm"),
    *norm("output_norm", "final_norm"),
]
_GGUF_VALUES = [
    row("blk.{}.attn_v.weight", "layers/attention/wv", "(k h) d -> d k h"),
    row("blk.{}.attn_v.bias", "layers/attention/bv", "(k h) -> k h"),
    row("blk.{}.attn_output.weight", "layers/attention/wo", "d (n h) -> n h d"),
    row("blk.{}.attn_output.bias", "layers/attention/bo", "d"),
]
_GGUF_QK = [
    row("blk.{}.attn_q.weight", "layers/attention/wq", "(n h) d -> d n h"),
    row("blk.{}.attn_k.weight", "layers/attention/wk", "(k h) d -> d k h"),
    row("blk.{}.attn_q.bias", "layers/attention/bq", "(n h) -> n h"),
    row("blk.{}.attn_k.bias", "layers/attention/bk", "(k h) -> k h"),
    row("blk.{}.attn_q_norm.weight", "layers/attention/q_norm/scale", "h"),
    row("blk.{}.attn_k_norm.weight", "layers/attention/k_norm/scale", "h"),
]
# For this one architecture llama.cpp stores the two channels of each rotated pair side by side
# (p two); our tree, like Hugging Face, has all first channels and then all second ones (two p).
_GGUF_QK_PAIRED = [
    row("blk.{}.attn_q.weight", "layers/attention/wq", "(n p two) d -> d n (two p)"),
    row("blk.{}.attn_k.weight", "layers/attention/wk", "(k p two) d -> d k (two p)"),
    row("blk.{}.attn_q.bias", "layers/attention/bq", "(n p two) -> n (two p)"),
    row("blk.{}.attn_k.bias", "layers/attention/bk", "(k p two) -> k (two p)"),
]
_GGUF_PLAIN = [*_GGUF_ENDS, *_GGUF_NORMS, *_GGUF_QK, *_GGUF_VALUES, *_GGUF_MLP]

TABLES: dict[str, list[Row]] = {
    "llama": [*_GGUF_ENDS, *_GGUF_NORMS, *_GGUF_QK_PAIRED, *_GGUF_VALUES, *_GGUF_MLP],
    "qwen2": _GGUF_PLAIN,
    "qwen3": _GGUF_PLAIN,
    "gemma2": [
        *_GGUF_ENDS,
        *_GGUF_QK,
        *_GGUF_VALUES,
        *_GGUF_MLP,
        # llama.cpp adds the 1 that Gemma's norms add when they run.
        *norm("blk.{}.attn_norm", "layers/attention_norm", 1.0),
        *norm("blk.{}.post_attention_norm", "layers/attention_post_norm", 1.0),
        *norm("blk.{}.ffn_norm", "layers/mlp_norm", 1.0),
        *norm("blk.{}.post_ffw_norm", "layers/mlp_post_norm", 1.0),
        *norm("output_norm", "final_norm", 1.0),
    ],
    "gptneox": [
        *_GGUF_ENDS,
        *_GGUF_NORMS,
        *_GGUF_MLP,
        row(
            "blk.{}.attn_qkv.weight", "layers/attention/{wq,wk,wv}", "(three n h) d -> three d n h"
        ),
        row("blk.{}.attn_qkv.bias", "layers/attention/{bq,bk,bv}", "(three n h) -> three n h"),
        *_GGUF_VALUES[2:],
    ],
}
