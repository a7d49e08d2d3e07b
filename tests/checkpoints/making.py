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
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec

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
# GGUF architecture -> the spec it can hold
GGUF_SPECS = {
    "llama": BASE,
    "qwen2": dataclasses.replace(SPECS["qwen2"], windows=(None, None)),
    "qwen3": SPECS["qwen3"],
    "gemma2": SPECS["gemma2"],
    "gptneox": SPECS["gpt_neox"],
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
        "rope.freq_base": 10000.0,
        "rope.dimension_count": spec.encoding.dim,
    }
    if architecture == "gptneox":
        facts |= {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True}
    else:
        facts["attention.layer_norm_rms_epsilon"] = 1e-5
    if architecture in ("gemma2", "qwen3"):
        facts |= {"attention.key_length": 8, "attention.value_length": 8}
    if architecture == "gemma2":
        facts |= {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    return {f"{architecture}.{name}": value for name, value in facts.items()}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    params: dict | None = None,
    kind: str = "F32",
    metadata: dict | None = None,
    changed: dict | None = None,
) -> Path:
    """A GGUF file: of other metadata, and other tensors where `changed` names some (None: none)."""
    spec = GGUF_SPECS[architecture]
    params = random_params(spec) if params is None else params
    written = {
        item.name: make()
        for item, make in tensors.write(spec, gguf_weights.TABLES[architecture], params)
    }
    pairs = gguf_metadata(architecture) | tokenizer_metadata(tiny_tokenizer()) | (metadata or {})
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
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
