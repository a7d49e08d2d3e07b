"""Tiny checkpoints of every family and format, made by hand so that tests need no network."""

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from lminf.attention import rope
from lminf.checkpoints import gguf_weights, tensors, weight_maps
from lminf.data.tokenizers import Tokenizer
from lminf.models.spec import MLPSpec, ModelSpec, MoESpec, NormSpec

BASE = ModelSpec(
    family="llama",
    vocab_size=320,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp=MLPSpec(64, "silu", gated=True, bias=False),
    norm=NormSpec("rms", 1e-5, bias=False, scale_offset=0.0),
    encoding=rope.Rotary(10000.0, 8, "half"),
    trained_length=64,
    windows=(None, None),
    residual="sequential",
    qkv_bias=False,
    out_bias=False,
    qk_norm=None,
    post_norms=False,
    query_scale=8**-0.5,
    qkv_clip=None,
    attention_soft_cap=None,
    final_soft_cap=None,
    embed_scale=1.0,
    tied=False,
    head_bias=False,
)
LAYER_NORM = NormSpec("layer", 1e-5, bias=True, scale_offset=0.0)
PLAIN = MLPSpec(64, "gelu", gated=False, bias=True)

SPECS = {
    "llama": BASE,
    "llama_biased": dataclasses.replace(
        BASE, qkv_bias=True, out_bias=True, mlp=MLPSpec(64, "silu", True, True), tied=True
    ),
    "mistral": dataclasses.replace(BASE, family="mistral", windows=(16, 16)),
    "qwen2": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, windows=(None, 16)),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm="head"),
    "gemma2": dataclasses.replace(
        BASE,
        family="gemma2",
        mlp=MLPSpec(64, "gelu_tanh", True, False),
        norm=NormSpec("rms", 1e-5, bias=False, scale_offset=1.0),
        windows=(16, None),
        post_norms=True,
        attention_soft_cap=50.0,
        final_soft_cap=30.0,
        embed_scale=32**0.5,
        tied=True,
    ),
    "gpt_neox": dataclasses.replace(
        BASE,
        family="gpt_neox",
        num_kv_heads=4,
        mlp=PLAIN,
        norm=LAYER_NORM,
        encoding=rope.Rotary(10000.0, 2, "half"),
        residual="parallel",
        qkv_bias=True,
        out_bias=True,
    ),
    "gptj": dataclasses.replace(
        BASE,
        family="gptj",
        num_kv_heads=4,
        mlp=dataclasses.replace(PLAIN, activation="gelu_tanh"),
        norm=LAYER_NORM,
        encoding=rope.Rotary(10000.0, 4, "interleaved"),
        residual="parallel_shared",
        head_bias=True,
    ),
    "mpt": dataclasses.replace(
        BASE,
        family="mpt",
        num_kv_heads=4,
        mlp=MLPSpec(128, "gelu", False, False),  # transformers knows four widths only
        norm=dataclasses.replace(LAYER_NORM, bias=False),
        encoding=rope.Alibi(8.0),
        qkv_clip=6.0,
        query_scale=0.25,
        tied=True,
    ),
}
_GEMMA = dataclasses.replace(
    SPECS["gemma2"], family="gemma", post_norms=False, windows=(None, None),
    attention_soft_cap=None, final_soft_cap=None,
)  # fmt: skip
_LOCAL = {"num_layers": 4, "windows": (16, 16, 16, None)}  # as llama.cpp has it for most
_MOE = MoESpec(
    experts=4, top_k=2, hidden_dim=24, shared_dim=0, dense_layers=0, normalised=True,
    capacity_factor=None,
)  # fmt: skip
_COHERE = dataclasses.replace(
    BASE, family="cohere", norm=dataclasses.replace(LAYER_NORM, bias=False), tied=True,
    encoding=rope.Rotary(10000.0, 8, "interleaved"), residual="parallel_shared",
    qk_norm="each_head", logit_scale=0.25,
)  # fmt: skip
_OLD = dataclasses.replace(
    BASE, num_kv_heads=4, mlp=MLPSpec(128, "gelu_tanh", gated=False, bias=True), norm=LAYER_NORM,
    qkv_bias=True, out_bias=True, tied=True,
)  # fmt: skip
# GGUF architecture -> the spec it can hold; more of one architecture behind a slash.
GGUF_SPECS = {
    "llama": BASE,
    "llama/mixtral": dataclasses.replace(
        BASE, family="mixtral", moe=dataclasses.replace(_MOE, hidden_dim=64)
    ),
    "granite": dataclasses.replace(
        BASE, family="granite", query_scale=0.5, embed_scale=3.0, residual_scale=0.5,
        logit_scale=0.25,
    ),
    "mistral3": dataclasses.replace(
        BASE, family="ministral3", query_gain=rope.QueryGain(0.125, 16),
        encoding=rope.Rotary(10000.0, 8, "half", rope.YaRN(4.0, 16, attention_factor=1.0)),
    ),
    "smollm3": dataclasses.replace(
        BASE, family="smollm3", num_layers=4, windows=(None,) * 4,
        layer_encodings=(None, None, None, rope.NoEncoding()),
    ),
    "qwen2": dataclasses.replace(SPECS["qwen2"], windows=(None, None)),
    "qwen3": SPECS["qwen3"],
    "qwen3moe": dataclasses.replace(BASE, family="qwen3_moe", qk_norm="head", moe=_MOE),
    "gemma": _GEMMA,
    "gemma2": SPECS["gemma2"],
    "gemma3": dataclasses.replace(
        _GEMMA, family="gemma3_text", post_norms=True, qk_norm="head", num_layers=6,
        encoding=rope.Rotary(1e6, 8, "half", rope.Linear(2.5)), windows=(16,) * 5 + (None,),
        layer_encodings=(rope.Rotary(10000.0, 8, "half"),) * 5 + (None,),
    ),
    "olmo2": dataclasses.replace(
        BASE, family="olmo2", qk_norm="all", pre_norms=False, post_norms=True
    ),
    "olmo2/olmo3": dataclasses.replace(
        BASE, family="olmo3", qk_norm="all", pre_norms=False, post_norms=True, **_LOCAL,
        encoding=rope.Rotary(10000.0, 8, "half", rope.YaRN(4.0, 16)),
        layer_encodings=(rope.Rotary(10000.0, 8, "half"),) * 3 + (None,),
    ),
    "phi3": dataclasses.replace(
        BASE, family="phi3", windows=(16, 16), encoding=rope.Rotary(10000.0, 4, "half")
    ),
    "phi3/longrope": dataclasses.replace(
        BASE, family="phi3",
        encoding=rope.Rotary(
            10000.0, 4, "half", rope.LongRoPE((1.0, 1.5), (2.0, 4.5), 16, 4.0)
        ),
    ),
    "glm4": dataclasses.replace(
        BASE, family="glm4", qkv_bias=True, post_norms=True,
        encoding=rope.Rotary(10000.0, 4, "interleaved"),
    ),
    "stablelm": dataclasses.replace(
        BASE, family="stablelm", norm=LAYER_NORM, qkv_bias=True,
        encoding=rope.Rotary(10000.0, 2, "half"),
    ),
    "stablelm/parallel": dataclasses.replace(
        BASE, family="stablelm", norm=LAYER_NORM, qk_norm="each_head", residual="parallel_shared",
        encoding=rope.Rotary(10000.0, 2, "half"),
    ),
    "command-r": _COHERE,
    "cohere2": dataclasses.replace(
        _COHERE, family="cohere2", qk_norm=None, **_LOCAL,
        layer_encodings=(None, None, None, rope.NoEncoding()),
    ),
    "gpt-oss": dataclasses.replace(
        BASE, family="gpt_oss", qkv_bias=True, out_bias=True, sinks=True, windows=(16, None),
        mlp=MLPSpec(24, "quick_gelu", gated=True, bias=False, clip=7.0, up_offset=1.0),
        moe=dataclasses.replace(_MOE, bias=True),
        encoding=rope.Rotary(10000.0, 8, "half", rope.YaRN(4.0, 16, truncate=False)),
    ),
    "gptneox": SPECS["gpt_neox"],
    "gpt2": dataclasses.replace(_OLD, family="gpt2", encoding=rope.Learnt(1024, 0)),
    "mpt": dataclasses.replace(SPECS["mpt"], query_scale=8**-0.5),
    "bloom": dataclasses.replace(
        _OLD, family="bloom", encoding=rope.Alibi(8.0), embed_norm=True,
    ),
    "falcon": dataclasses.replace(
        BASE, family="falcon", num_kv_heads=1, mlp=MLPSpec(128, "gelu", gated=False, bias=False),
        norm=LAYER_NORM, residual="parallel_shared",
    ),
    "falcon/two_norms": dataclasses.replace(
        BASE, family="falcon", mlp=MLPSpec(128, "gelu", gated=False, bias=False), norm=LAYER_NORM,
        residual="parallel",
    ),
}  # fmt: skip
# What llama.cpp's converter writes beside the shapes.
_YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
_GGUF_FACTS = {
    "llama/mixtral": {"expert_count": 4, "expert_used_count": 2},
    "granite": {
        "attention.scale": 0.5, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 4.0,
    },
    "mistral3": {"attention.temperature_scale": 0.125, "rope.scaling.yarn_log_multiplier": 1.0}
    | {f"rope.scaling.{name}": value for name, value in _YARN.items()},
    "qwen3moe": {
        "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24,
    },
    "gemma2": {
        "attention.sliding_window": 16, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 2.5,
    },
    "olmo2/olmo3": {"attention.sliding_window": 16}
    | {f"rope.scaling.{name}": value for name, value in _YARN.items()},
    "gpt-oss": {
        "attention.sliding_window": 16, "expert_count": 4, "expert_used_count": 2,
        "expert_feed_forward_length": 24,
    } | {f"rope.scaling.{name}": value for name, value in _YARN.items()},
    "phi3": {"attention.sliding_window": 16, "rope.scaling.original_context_length": 64},
    "phi3/longrope": {
        "attention.sliding_window": 0, "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.5**0.5,
    },
    "stablelm": {"use_parallel_residual": False},
    "stablelm/parallel": {"use_parallel_residual": True},
    "command-r": {"logit_scale": 0.25, "rope.scaling.type": "none"},
    "cohere2": {"logit_scale": 0.25, "attention.sliding_window": 16, "rope.scaling.type": "none"},
    "gptneox": {"use_parallel_residual": True},
    "mpt": {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 6.0},
    "falcon": {"tensor_data_layout": "jploski"},
    "falcon/two_norms": {"tensor_data_layout": "jploski"},
}  # fmt: skip
# Tensors that follow from the rotary schedule.
GGUF_FACTORS = {
    "phi3/longrope": {
        "rope_factors_short.weight": np.array([1.0, 1.5], np.float32),
        "rope_factors_long.weight": np.array([2.0, 4.5], np.float32),
    },
}


def random_params(spec: ModelSpec, seed: int = 0) -> dict:
    """A tree of the spec's shapes, float32."""
    rng = np.random.default_rng(seed)
    return tensors.nested(
        {
            path: rng.standard_normal(shape, np.float32)
            for path, shape in weight_maps.tree_shapes(spec).items()
        }
    )


def assert_same(a: dict, b: dict) -> None:
    """The two trees are equal, bit for bit."""
    flat_a, flat_b = tensors.flattened(a), tensors.flattened(b)
    assert set(flat_a) == set(flat_b)
    for path, value in flat_a.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(flat_b[path]), err_msg=path)


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of 272 tokens, two of them special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the rat sat on the cat " * 20], trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "<|im_end|>")])
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return Tokenizer(backend, special, True, (backend.token_to_id("<|im_end|>"),), CHAT)


def tokenizer_metadata(tokenizer: Tokenizer, pre: str = "gpt-2") -> dict:
    """The tokenizer as GGUF says it."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = {t.content for t in tokenizer.backend.get_added_tokens_decoder().values()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in added else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<s>"],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.chat_template": CHAT,
    }


def gguf_metadata(architecture: str) -> dict:
    """What llama.cpp's converter writes about GGUF_SPECS[architecture]."""
    spec = GGUF_SPECS[architecture]
    facts = {
        "block_count": spec.num_layers,
        "context_length": spec.trained_length,
        "embedding_length": spec.width,
        "feed_forward_length": spec.mlp.hidden_dim,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
    }
    if isinstance(spec.encoding, rope.Rotary):
        facts |= {
            "rope.freq_base": spec.encoding.base,
            "rope.dimension_count": spec.encoding.dim,
        }
    kind = "layer_norm" if spec.norm.kind == "layer" else "layer_norm_rms"
    facts[f"attention.{kind}_epsilon"] = 1e-5
    if architecture.startswith(("gemma", "qwen3")):
        facts |= {"attention.key_length": 8, "attention.value_length": 8}
    facts |= _GGUF_FACTS.get(architecture, {})
    name = architecture.partition("/")[0]
    return {f"{name}.{key}": value for key, value in facts.items()}


def gguf_rows(architecture: str) -> list:
    """The weight map of GGUF_SPECS[architecture]."""
    residual = GGUF_SPECS[architecture].residual
    return gguf_weights.rows_of(architecture.partition("/")[0], residual)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    params: dict | None = None,
    kind: str = "F32",
    metadata: dict | None = None,
    changed: dict | None = None,
    tensors_in_a_part: int = 0,
) -> Path:
    """A GGUF file: of other metadata, and other tensors where `changed` names some (None: none)."""
    spec = GGUF_SPECS[architecture]
    params = random_params(spec) if params is None else params
    written = {
        item.name: make() for item, make in tensors.write(spec, gguf_rows(architecture), params)
    } | GGUF_FACTORS.get(architecture, {})
    pairs = gguf_metadata(architecture) | tokenizer_metadata(tiny_tokenizer()) | (metadata or {})
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(
        path, architecture.partition("/")[0], split_max_tensors=tensors_in_a_part
    )
    for key, value in pairs.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, value in (written | (changed or {})).items():
        if value is None:
            continue
        if value.ndim == 2 and kind != "F32":  # as llama.cpp does: vectors stay float32
            quantised = gguf.quants.quantize(value, quantisation)
            writer.add_tensor(name, quantised, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentence_piece_metadata() -> dict:
    """A vocabulary in the way of SentencePiece, as GGUF says it; None takes away."""
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["▁", *letters, ",", ".", "th", "▁t", "▁th", "at", "he", "▁the", "cat", "▁cat", "sat"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens = tokens[:320]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *(6,) * 256, *(1,) * len(pieces)][: len(tokens)],
        "tokenizer.ggml.scores": [0.0, *(-float(i) for i in range(1, len(tokens)))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
