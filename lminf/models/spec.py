"""ModelSpec: the shapes and rules of one decoder, and what follows from them.

A spec holds what a checkpoint fixes, so it has no defaults for facts: an importer reads every
field or refuses. How attention is *run* (the policy) is not here, except what the model was
trained with (`windows`).

Parameters of a spec, as a nested dictionary (letters: lminf/types.py; L stacked on axis 0):

    embed                         [V, D]
    positions                     [P, D]      with encoding Learnt: its offset + length rows
    embed_norm/scale              [D]         when embed_norm
    layers/attention_norm/scale   [L, D]      when pre_norms; /bias when norm.bias
    layers/attention/wq wk wv     [L, D, N, H] [L, D, K, H] [L, D, K, H]   bq bk bv when qkv_bias
    layers/attention/wo           [L, N, H, D]                             bo when out_bias
    layers/attention/q_norm k_norm/scale              [L, H]   when qk_norm == "head"
    layers/attention/q_head_norms k_head_norms/scale  [L, N, H] [L, K, H]   … "each_head", "all"
    layers/attention/sinks        [L, N]      when sinks
    layers/attention_post_norm/…  [L, D]      when post_norms
    layers/mlp_norm/scale         [L, D]      when pre_norms, unless residual "parallel_shared"
    layers/mlp/w_gate             [L, D, F]   when mlp.gated                b_gate when mlp.bias
    layers/mlp/w_up w_down        [L, D, F] [L, F, D]             b_up b_down when mlp.bias
    layers/mlp_post_norm/…        [L, D]      when post_norms
    layers/moe/router             [L, D, E]   with moe, in place of mlp (M: the experts' own F),
                                              unless its router learns nothing
    layers/moe/correction_bias    [L, E]      when moe.router.bias_rate
    layers/moe/gate up down       [L, E, D, M] [L, E, D, M] [L, E, M, D]   gate when mlp.gated
    layers/moe/b_router b_gate b_up b_down  [L, E] [L, E, M] [L, E, M] [L, E, D]   when moe.bias
    layers/shared/w_gate …        as mlp      when moe.shared_dim
    first_layers/…                [L', …]     as layers without moe, the moe.dense_layers before it
    final_norm/scale              [D]         norms of the width have a bias when norm.bias
    head                          [V, D]      unless tied
    head_bias                     [V]         when head_bias
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

from lminf import ranges
from lminf.attention.rope import (
    DynamicNTK,
    Encoding,
    Learnt,
    Length,
    Linear,
    LongRoPE,
    NTKAware,
    QueryGain,
    Rotary,
    YaRN,
)
from lminf.errors import InputError
from lminf.models.routers import TOKEN_CHOICE, Router
from lminf.ranges import Range

# 2^31 - 1: the largest id and the largest axis of an array that 32-bit indices reach.
Size: TypeAlias = Annotated[int, Range(min=1, max=2**31 - 1)]
Layers: TypeAlias = Annotated[int, Range(min=1, max=2**12)]
Epsilon: TypeAlias = Annotated[float, Range(above=0, max=1)]
Multiplier: TypeAlias = Annotated[float, Range(min=1e-6, max=1e6)]
# Scores are divided by a cap and activations are clipped to one: both must stay in float32.
Cap: TypeAlias = Annotated[float, Range(min=1e-3, max=1e6)]


@dataclass(frozen=True)
class NormSpec:
    kind: Literal["rms", "layer"]
    epsilon: Epsilon
    bias: bool  # only layer norms have one
    # Added to the stored scale: 1.0 for Gemma, else 0.0.
    scale_offset: Annotated[float, Range(min=0, max=1)]

    def __post_init__(self):
        ranges.check(self)


@dataclass(frozen=True)
class MLPSpec:
    hidden_dim: Size  # F
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"]
    gated: bool  # act(x w_gate) * (x w_up), else act(x w_up)
    bias: bool
    # GPT-OSS: gates at most this and what they multiply within +- this, of which it takes up + 1.
    clip: Cap | None = None
    up_offset: Annotated[float, Range(min=0, max=1)] = 0.0

    def __post_init__(self):
        ranges.check(self)


@dataclass(frozen=True)
class MoESpec:
    """Experts that replace the MLP; their activation and gating are the MLP's."""

    experts: Size  # E
    top_k: Size  # k, experts per token
    hidden_dim: Size  # of one expert
    # Hidden size of an MLP that reads every token beside them; 0: none.
    shared_dim: Annotated[int, Range(min=0, max=2**31 - 1)]
    # Layers at the start that have an MLP instead.
    dense_layers: Annotated[int, Range(min=0, max=2**12)]
    normalised: bool  # the weights of a token's experts sum to 1
    # Most tokens that an expert reads, as a multiple of its even share; None: no token is dropped.
    capacity_factor: Annotated[float, Range(above=0)] | None
    bias: bool = False  # of the router and of the experts
    router: Router = TOKEN_CHOICE

    def __post_init__(self):
        ranges.check(self)
        if self.top_k > self.experts:
            raise InputError(
                f"top_k={self.top_k} of {self.experts} experts; give at most all of them"
            )
        if not self.router.causal and (self.capacity_factor is not None or self.normalised):
            raise InputError(
                "where experts choose, each reads its even share and a token has any number of "
                "them; set capacity_factor=None and normalised=False"
            )

    @property
    def computed_experts(self) -> float:
        """Experts whose products are computed for a token, whether it uses them or not."""
        if not self.router.causal:
            return self.top_k
        if self.capacity_factor is None:
            return self.experts
        return self.capacity_factor * self.top_k

    def fine_grained(self, pieces: int, shared: int) -> "MoESpec":
        """As many parameters, in all and for each token, in experts cut into `pieces`, of which
        `shared` read every token.

        Source: DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066, equation 9: of mN experts K_s are
        shared, and of the rest a token takes mK - K_s.
        """
        if pieces < 1 or self.hidden_dim % pieces:
            raise InputError(
                f"{pieces} pieces do not divide an expert of {self.hidden_dim} channels; give a "
                f"divisor of {self.hidden_dim}"
            )
        if not 0 <= shared < pieces * self.top_k:
            raise InputError(
                f"{shared} shared of the {pieces * self.top_k} pieces that a token uses; leave at "
                f"least one to the router"
            )
        hidden_dim = self.hidden_dim // pieces
        return replace(
            self, experts=pieces * self.experts - shared, top_k=pieces * self.top_k - shared,
            hidden_dim=hidden_dim, shared_dim=self.shared_dim + shared * hidden_dim,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    family: str  # the architecture's name in checkpoints: llama, mistral, qwen2, …
    vocab_size: Size  # V, rows of the embedding
    width: Size  # D
    num_layers: Layers  # L
    num_heads: Size  # N
    num_kv_heads: Size  # K
    head_dim: Size  # H
    mlp: MLPSpec
    norm: NormSpec
    encoding: Encoding
    trained_length: Length  # tokens the checkpoint says it was trained to read
    windows: tuple[Length | None, ...]  # [L] the layer's own attention window in tokens; None: all
    residual: Literal[
        "sequential", "parallel", "parallel_shared"
    ]  # parallel_shared: one norm for both
    qkv_bias: bool
    out_bias: bool
    # Queries and keys normalised: each head with one scale for all heads, or with its own, or all
    # heads together.
    qk_norm: Literal["head", "each_head", "all"] | None
    post_norms: bool  # norms of what attention and MLP give, before it is added
    query_scale: Multiplier  # multiplies the scores; usually head_dim ** -0.5
    qkv_clip: Cap | None  # MPT: queries, keys, values clipped to +- this
    attention_soft_cap: Cap | None
    final_soft_cap: Cap | None
    embed_scale: Multiplier  # multiplies the embeddings: sqrt(D) for Gemma, else 1.0
    tied: bool  # the head is the embedding
    head_bias: bool
    # What few models have. An importer refuses the fields that ask for it unless it reads them.
    moe: MoESpec | None = None
    # [L], or (): the layers whose encoding is not `encoding`, which is that of the others (None)
    # and the one that a scaling is applied to.
    layer_encodings: tuple[Encoding | None, ...] = ()
    pre_norms: bool = True  # norms of what attention and MLP read
    embed_norm: bool = False  # the embeddings are normalised
    sinks: bool = False  # a learnt logit of each head joins its softmax and has no value
    residual_scale: Multiplier = 1.0  # multiplies what attention and MLP add
    logit_scale: Multiplier = 1.0  # multiplies the logits
    query_gain: QueryGain | None = None  # what queries at late positions are multiplied by

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """[L] the encoding of every layer."""
        by_layer = self.layer_encodings or (None,) * self.num_layers
        return tuple(self.encoding if encoding is None else encoding for encoding in by_layer)

    @property
    def context_length(self) -> int:
        """Tokens apart that the model can place: its trained length, times what a scaling
        stretches. YaRN and LongRoPE name the length before stretching; a checkpoint's own is the
        one after.
        """
        scaling = self.encoding.scaling if isinstance(self.encoding, Rotary) else None
        if isinstance(scaling, YaRN | LongRoPE):
            return int(scaling.trained_length * scaling.factor)
        if isinstance(scaling, Linear):
            return int(self.trained_length * scaling.factor)
        if isinstance(scaling, NTKAware | DynamicNTK):
            return int(self.trained_length * scaling.alpha)
        return self.trained_length

    def __post_init__(self):
        ranges.check(self)
        rotated = self.encoding.dim if isinstance(self.encoding, Rotary) else 0
        if rotated is None:
            raise InputError("Rotary.dim is None; give the channels that the model rotates")
        if self.layer_encodings and len(self.layer_encodings) != self.num_layers:
            raise InputError(
                f"layer_encodings has {len(self.layer_encodings)} entries for {self.num_layers} "
                f"layers"
            )
        if any(isinstance(encoding, Learnt) for encoding in self.layer_encodings):
            raise InputError("learnt positions are added to embeddings: no layer has its own")
        if not (self.pre_norms or self.post_norms):
            raise InputError("no layer has a norm: pre_norms and post_norms are both False")
        if self.residual == "parallel_shared" and not self.pre_norms:
            raise InputError("residual 'parallel_shared' is one norm for both: set pre_norms")
        if self.moe is not None and self.mlp.bias:
            raise InputError("biases of experts are moe.bias: mlp.bias must be False")
        if self.moe is not None and self.moe.dense_layers >= self.num_layers:
            raise InputError(
                f"dense_layers={self.moe.dense_layers} leaves no layer of {self.num_layers} to moe"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if rotated > self.head_dim:
            raise InputError(f"the encoding rotates {rotated} of {self.head_dim} channels")
        if len(self.windows) != self.num_layers:
            raise InputError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers"
            )


def llama(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int,
    trained_length: int,
    rope_base: float = 10_000.0,
    tied: bool = True,
    moe: MoESpec | None = None,
) -> ModelSpec:
    """A Llama shape for training from scratch, where the facts are ours to choose."""
    if problem := Range(min=1, max=2**12).problem(num_layers, whole=True):
        raise InputError(f"num_layers is {num_layers}; give {problem}")  # a window is of each
    head_dim = width // num_heads
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp=MLPSpec(hidden_dim, "silu", gated=True, bias=False),
        norm=NormSpec("rms", 1e-5, bias=False, scale_offset=0.0),
        encoding=Rotary(rope_base, head_dim, "half"),
        trained_length=trained_length,
        windows=(None,) * num_layers,
        residual="sequential",
        qkv_bias=False,
        out_bias=False,
        qk_norm=None,
        post_norms=False,
        query_scale=head_dim**-0.5,
        qkv_clip=None,
        attention_soft_cap=None,
        final_soft_cap=None,
        embed_scale=1.0,
        tied=tied,
        head_bias=False,
        moe=moe,
    )
