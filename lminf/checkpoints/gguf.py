"""GGUF checkpoints: metadata -> ModelSpec, tensors -> parameter tree, vocabulary -> tokenizer."""

import math
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lminf.attention.rope import Linear, Llama3, Rotary, Scaling, Unscaled, YaRN
from lminf.checkpoints import gguf_tokenizer, maps, trees
from lminf.checkpoints.gguf_file import GGUFFile, open_gguf
from lminf.data.tokenizers import Tokenizer
from lminf.errors import InputError
from lminf.models.spec import MLPSpec, ModelSpec, NormSpec

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]
# architecture in the file -> (family, activation)
ARCHITECTURES: dict[str, tuple[str, Activation]] = {
    "llama": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "gemma2": ("gemma2", "gelu_tanh"),
    "gptneox": ("gpt_neox", "gelu"),
}
# Facts of an architecture that change nothing here: sizes said again, hints for quantisation.
IRRELEVANT = frozenset({"vocab_size", "tensor_data_layout"})
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's schedule divides each frequency by
# The schedules of the released models; the file holds only the factors that follow from them.
LLAMA3_SCHEDULES = tuple(Llama3(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))


def load(
    path: Path, *, dtype: Any = np.float32, progress: trees.Progress | None = None
) -> tuple[ModelSpec, dict[str, Any], Tokenizer]:
    """Spec, parameters (numpy, of `dtype`) and tokenizer of a GGUF file."""
    file = open_gguf(path)
    spec = read_spec(file)
    tokenizer = gguf_tokenizer.from_metadata(file.metadata, str(path))
    params = trees.read(
        spec,
        maps.GGUF[file.metadata["general.architecture"]],
        shapes={name: t.shape for name, t in file.tensors.items() if name != ROPE_FACTORS},
        tensor=file.read,
        dtype=dtype,
        source=str(path),
        progress=progress,
    )
    return spec, params, tokenizer


class _Facts:
    """`<architecture>.*` by name; notes what was asked for, so that the rest can be refused."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix = file, architecture + "."
        self.asked: set[str] = set()

    def get(self, name: str, absent: Any = None) -> Any:
        self.asked.add(name)
        return self.file.metadata.get(self.prefix + name, absent)

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise InputError(
                f"{self.file.path} has no {self.prefix}{name}; convert the model again with a "
                f"current converter"
            )
        return value

    def size(self, name: str, absent: int | None = None) -> int:
        """A positive whole number."""
        return self._positive(name, absent, int)

    def number(self, name: str, absent: float | None = None) -> float:
        """A positive number."""
        return self._positive(name, absent, (int, float))

    def _positive(self, name: str, absent: Any, kind: Any) -> Any:
        value = self[name] if absent is None else self.get(name, absent)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InputError(
                f"{self.file.path} has {self.prefix}{name} = {str(value)[:60]}, which no model "
                f"can have; the file is damaged, fetch it again"
            )
        return value

    def refuse_others(self) -> None:
        for key, value in self.file.metadata.items():
            name = key.removeprefix(self.prefix)
            if name != key and name not in self.asked | IRRELEVANT:
                raise InputError(
                    f"{self.file.path} has {key} = {str(value)[:60]}, which is not understood; "
                    f"only files whose every setting is understood are read"
                )


def read_spec(file: GGUFFile) -> ModelSpec:
    """Every fact of the model; what is not understood is refused by name.

    Keys outside the architecture's own and the tokenizer's are notes that others left in the file.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path} holds a model of the architecture {architecture!r}; the architectures "
            f"{', '.join(ARCHITECTURES)} are read"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them into one file"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no token_embd.weight; fetch the file again, whole")
    family, activation = ARCHITECTURES[architecture]
    facts = _Facts(file, architecture)
    gemma, neox = family == "gemma2", family == "gpt_neox"
    width, layers, heads = (
        facts.size(name) for name in ("embedding_length", "block_count", "attention.head_count")
    )
    kv_heads = facts.size("attention.head_count_kv", heads)
    head_dim = facts.size("attention.key_length", width // heads)
    values = facts.size("attention.value_length", head_dim)
    if values != head_dim or heads % kv_heads or layers > len(file.tensors):
        raise InputError(
            f"{file.path} has {heads} query and {kv_heads} key heads, keys of {head_dim} and "
            f"values of {values} channels, and {len(file.tensors)} tensors for {layers} layers; no "
            f"model of a known kind is like that"
        )
    norm = "attention.layer_norm_epsilon" if neox else "attention.layer_norm_rms_epsilon"
    spec = ModelSpec(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=MLPSpec(
            facts.size("feed_forward_length"),
            activation,
            gated=not neox,
            bias="blk.0.ffn_up.bias" in file.tensors,
        ),
        norm=NormSpec("layer" if neox else "rms", facts.number(norm), neox, 1.0 if gemma else 0.0),
        encoding=_encoding(facts, head_dim, family),
        trained_length=facts.size("context_length"),
        windows=_windows(facts, layers) if gemma else (None,) * layers,
        residual=_residual(facts) if neox else "sequential",
        qkv_bias=any(f"blk.0.attn_{x}.bias" in file.tensors for x in ("q", "qkv")),
        out_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=family == "qwen3",
        post_norms=gemma,
        # Gemma 2 27B, of 46 layers, scales by its width over its heads; the file does not say so.
        query_scale=(width // heads if gemma and layers == 46 else head_dim) ** -0.5,
        qkv_clip=None,
        attention_soft_cap=facts.number("attn_logit_softcapping") if gemma else None,
        final_soft_cap=facts.number("final_logit_softcapping") if gemma else None,
        embed_scale=width**0.5 if gemma else 1.0,
        tied="output.weight" not in file.tensors,
        head_bias=False,
    )
    facts.refuse_others()
    return spec


def _residual(facts: _Facts) -> Literal["parallel", "sequential"]:
    return "parallel" if facts["use_parallel_residual"] else "sequential"


def _windows(facts: _Facts, layers: int) -> tuple[int | None, ...]:
    window = facts.size("attention.sliding_window")
    return tuple(None if layer % 2 else window for layer in range(layers))


def _encoding(facts: _Facts, head_dim: int, family: str) -> Rotary:
    # The format's own default: files without this key are older than the key.
    base = float(facts.number("rope.freq_base", 10000.0))
    dim = facts.size("rope.dimension_count", head_dim)
    if family == "gpt_neox" and "gptneox.rope.dimension_count" not in facts.file.metadata:
        raise InputError(
            f"{facts.file.path} does not say how many channels are rotated "
            f"(gptneox.rope.dimension_count); convert the model again"
        )
    if dim % 2 or dim > head_dim:
        raise InputError(
            f"{facts.file.path} rotates {dim} of {head_dim} channels; the file is damaged, fetch "
            f"it again"
        )
    return Rotary(base, dim, "half", _scaling(facts, base, dim))


def _scaling(facts: _Facts, base: float, dim: int) -> Scaling:
    kind = facts.get("rope.scaling.type", "none")
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 1.0))
    trained = facts.size("rope.scaling.original_context_length", facts.size("context_length"))
    facts.get("rope.scaling.finetuned")  # says only whether training went on with the scaling
    attention_factor = facts.get("rope.scaling.attn_factor")
    if ROPE_FACTORS in facts.file.tensors:
        return _llama3(facts.file, base, dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return Unscaled()
    if kind == "linear":
        return Linear(factor)
    if kind == "yarn":
        fast = facts.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = facts.number("rope.scaling.yarn_beta_slow", 1.0)
        if attention_factor not in (None, 1.0):
            raise InputError(
                f"{facts.file.path} has rope.scaling.attn_factor = {attention_factor}, which is "
                f"not understood with YaRN; use the Hugging Face checkpoint of this model"
            )
        return YaRN(factor, trained, fast, slow)
    raise InputError(
        f"{facts.file.path} scales its rotary angles by {kind!r}; none, linear, yarn and Llama 3's "
        f"factors are read"
    )


def _llama3(file: GGUFFile, base: float, dim: int) -> Llama3:
    """The schedule whose factors the file holds."""
    factors = file.read(ROPE_FACTORS)
    plain = Unscaled().frequencies(base, dim)
    for schedule in LLAMA3_SCHEDULES:
        expected = plain / schedule.frequencies(base, dim)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-3):
            return schedule
    raise InputError(
        f"{file.path} holds rotary factors from {factors.min():.4g} to {factors.max():.4g}, those "
        f"of no released Llama 3 model; use the Hugging Face checkpoint of this model"
    )
