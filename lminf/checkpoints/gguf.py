"""GGUF checkpoints: metadata -> ModelSpec, tensors -> parameter tree, vocabulary -> tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lminf.attention.rope import Rotary
from lminf.checkpoints import gguf_tokenizer, maps
from lminf.checkpoints.gguf_file import GGUFFile, open_gguf
from lminf.data.tokenizers import Tokenizer
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec


def load(
    path: Path, *, dtype: Any = np.float32, progress: Callable[[int, int], None] | None = None
) -> tuple[ModelSpec, dict[str, Any], Tokenizer]:
    """Spec, parameters (numpy, `dtype`) and tokenizer of a GGUF file."""
    file = open_gguf(path)
    spec = read_spec(file)
    params = maps.read_tree(
        spec,
        maps.GGUF[spec.family],
        shapes={name: t.shape for name, t in file.tensors.items()},
        read=file.read,
        dtype=dtype,
        source=str(path),
        progress=progress,
    )
    return spec, params, gguf_tokenizer.from_metadata(file.metadata)


def read_spec(file: GGUFFile) -> ModelSpec:
    family = file.metadata["general.architecture"]

    def fact(name: str) -> Any:
        return file.metadata[f"{family}.{name}"]

    head_dim = fact("embedding_length") // fact("attention.head_count")
    return ModelSpec(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=fact("embedding_length"),
        num_layers=fact("block_count"),
        num_heads=fact("attention.head_count"),
        num_kv_heads=fact("attention.head_count_kv"),
        head_dim=head_dim,
        mlp=MLPSpec(fact("feed_forward_length"), "silu", gated=True, bias=False),
        norm=NormSpec(
            "rms", fact("attention.layer_norm_rms_epsilon"), bias=False, scale_offset=0.0
        ),
        encoding=Rotary(fact("rope.freq_base"), fact("rope.dimension_count"), "half"),
        trained_length=fact("context_length"),
        windows=(None,) * fact("block_count"),
        residual="sequential",
        qkv_bias=False,
        out_bias=False,
        qk_norm=False,
        post_norms=False,
        query_scale=head_dim**-0.5,
        qkv_clip=None,
        attention_soft_cap=None,
        final_soft_cap=None,
        embed_scale=1.0,
        tied="output.weight" not in file.tensors,
        head_bias=False,
    )
