"""Writes the goldens: tiny random models and what transformers computes with them.

    python tests/goldens/make.py [CASE ...]        needs torch and transformers, about 20 seconds

Every case is a folder `tests/goldens/<case>/` with the model as transformers saves it
(`config.json`, `model.safetensors`) and `expected.npz`:

    tokens        [2, T] int32
    logits        [2, T, V] float32, soft-capped where the model does that
    hidden        [L + 1, 2, T, D] float32: the embeddings as the first layer receives them, then
                  the residual stream after each layer. Caught by hooks on the layers, because the
                  last entry of transformers' own `hidden_states` has been through the final norm.
    transformers, torch    the versions that computed this

The families of `SMALL` store float16 weights and the hidden states of the first row, which makes a
golden a quarter as large; their weights were rounded before transformers ran.

Models run on the CPU in float32 with eager attention. Weights are large, norms and biases far from
1 and 0, and constants (rotary base, epsilon, caps, windows, clips) unlike any default, so that a
parameter or a setting that is lost or misread moves the logits by much more than the tolerance.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
T = 32  # tokens; longer than every sliding window and than the dynamic case's trained length
VOCAB = 96
SMALL_VOCAB = 24


def _llama(**changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    return transformers.LlamaConfig(**(settings | changes))


def _scaled(rope_type, **more):
    return {"rope_type": rope_type, "rope_theta": 500.0, **more}


def _mistral():
    # head_dim * heads is not the width; the window is shorter than the text.
    return transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=_scaled("default"),
        sliding_window=7,
    )


def _qwen(config_class, **more):
    return config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=_scaled("default"),
        **more,
    )


def _gemma2():
    return transformers.Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=_scaled("default"),
        query_pre_attn_scalar=10,
        sliding_window=7,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    )


def _gpt_neox(**changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "layer_norm_eps": 2e-3,
        # head_dim 16, of which 4 channels are rotated
        "rope_parameters": _scaled("default", partial_rotary_factor=0.25),
    }
    return transformers.GPTNeoXConfig(**(settings | changes))


def _gptj():
    return transformers.GPTJConfig(
        vocab_size=VOCAB,
        n_embd=48,
        n_inner=64,
        n_layer=2,
        n_head=3,
        n_positions=64,
        rotary_dim=4,
        layer_norm_epsilon=2e-3,
        bos_token_id=0,
        eos_token_id=0,
    )


def _mpt(*, width, heads, **attention):
    # transformers' port has these four fixed, whatever its config says: an MLP of 4 widths, no
    # biases, ALiBi on, and a largest bias of 8. The config says what the port does.
    return transformers.MptConfig(
        vocab_size=VOCAB,
        d_model=width,
        n_heads=heads,
        n_layers=2,
        max_seq_len=64,
        expansion_ratio=4,
        layer_norm_epsilon=2e-3,
        learned_pos_emb=False,
        no_bias=True,
        attn_config=dict(alibi=True, alibi_bias_max=8, **attention),
        bos_token_id=0,
        eos_token_id=0,
    )


def _small(config_class, **changes):
    """The sizes of SMALL, under the names that most families have for them."""
    settings = {
        "vocab_size": SMALL_VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_parameters": _scaled("default"),
        "pad_token_id": None,
    }
    settings = {name: value for name, value in (settings | changes).items() if value is not ...}
    return getattr(transformers, config_class)(**settings)


def _local_first(**more):
    """A layer with a window, then one without."""
    types = ["sliding_attention", "full_attention"]
    return dict(sliding_window=7, layer_types=types, **more)


def _by_type(**full):
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": _scaled(**full) if full else _scaled("default"),
    }


def _layer_norm(config_class, **changes):
    norm = {"rms_norm_eps": ..., "layer_norm_eps": 2e-3}
    return _small(config_class, **(norm | changes))


def _gpt2():
    return transformers.GPT2Config(
        vocab_size=SMALL_VOCAB, n_embd=16, n_inner=24, n_layer=2, n_head=4, n_positions=40,
        layer_norm_epsilon=2e-3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _opt():
    return transformers.OPTConfig(
        vocab_size=SMALL_VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, word_embed_proj_dim=16,
        pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _bloom(heads=4):
    return transformers.BloomConfig(
        vocab_size=SMALL_VOCAB, hidden_size=4 * heads, n_layer=2, n_head=heads,
        layer_norm_epsilon=2e-3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _falcon(**changes):
    settings = {
        "vocab_size": SMALL_VOCAB,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "layer_norm_epsilon": 2e-3,
        "rope_parameters": _scaled("default"),
        "new_decoder_architecture": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.FalconConfig(**(settings | changes))


SMALL = {
    "gemma": lambda: _small("GemmaConfig", head_dim=6),
    "gemma3": lambda: _small(
        "Gemma3TextConfig",
        head_dim=6,
        query_pre_attn_scalar=10,
        rope_parameters=_by_type(rope_type="linear", factor=2.5),
        **_local_first(),
    ),
    "phi3": lambda: _small(
        "Phi3Config", rope_parameters=_scaled("default", partial_rotary_factor=0.5)
    ),
    # 12 tokens trained: the long list holds from the first piece of every test on.
    "phi3_longrope": lambda: _small(
        "Phi3Config",
        hidden_size=32,
        max_position_embeddings=48,
        original_max_position_embeddings=12,
        sliding_window=23,
        rope_parameters=_scaled(
            "longrope",
            short_factor=[1.0, 1.5, 2.0, 2.5],
            long_factor=[1.5, 3.0, 5.0, 8.0],
            original_max_position_embeddings=12,
        ),
    ),
    "mixtral": lambda: _small(
        "MixtralConfig", num_local_experts=3, num_experts_per_tok=2, sliding_window=7
    ),
    "qwen3_moe": lambda: _small(
        "Qwen3MoeConfig",
        head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=False,
    ),
    "smollm3": lambda: _small("SmolLM3Config", no_rope_layers=[1, 0], bos_token_id=0,
                              eos_token_id=0),
    "olmo2": lambda: _small("Olmo2Config"),
    "olmo3": lambda: _small(
        "Olmo3Config",
        rope_parameters=_by_type(
            rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=0.5,
            original_max_position_embeddings=16,
        ),
        **_local_first(),
    ),
    "ministral": lambda: _small("MinistralConfig", head_dim=6, **_local_first()),
    # Past the original 8 tokens queries grow in four steps; mscale undoes YaRN's temperature.
    "ministral3": lambda: _small(
        "Ministral3Config",
        head_dim=8,
        rope_parameters=_scaled(
            "yarn", factor=8.0, beta_fast=4.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=8, llama_4_scaling_beta=0.4,
        ),
    ),
    "granite": lambda: _small(
        "GraniteConfig",
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "glm": lambda: _small(
        "GlmConfig", head_dim=8, rope_parameters=_scaled("default", partial_rotary_factor=0.5)
    ),
    "glm4": lambda: _small(
        "Glm4Config", head_dim=8, rope_parameters=_scaled("default", partial_rotary_factor=0.5)
    ),
    "stablelm": lambda: _layer_norm(
        "StableLmConfig",
        rope_parameters=_scaled("default", partial_rotary_factor=0.5),
        use_qkv_bias=True,
    ),
    "stablelm_parallel": lambda: _layer_norm(
        "StableLmConfig",
        rope_parameters=_scaled("default", partial_rotary_factor=0.5),
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "cohere": lambda: _layer_norm("CohereConfig", logit_scale=0.3, use_qk_norm=True),
    "cohere2": lambda: _layer_norm("Cohere2Config", logit_scale=0.3, **_local_first()),
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": lambda: _bloom(6),  # six heads: the slopes are picked out of eight
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_7b": lambda: _falcon(multi_query=True),
    "falcon_alibi": lambda: _falcon(
        alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "gpt_oss": lambda: _small(
        "GptOssConfig",
        head_dim=8,
        max_position_embeddings=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=0.7,
        attention_bias=True,
        rope_parameters=_scaled(
            "yarn", factor=4.0, beta_fast=4.0, beta_slow=0.5, truncate=False,
            original_max_position_embeddings=32,
        ),
        **_local_first(),
    ),
}  # fmt: skip

CASES = {
    "llama": lambda: _llama(num_key_value_heads=4),
    "llama_gqa": _llama,
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama_bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama_llama3": lambda: _llama(
        rope_parameters=_scaled(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        max_position_embeddings=256,
    ),
    "llama_linear": lambda: _llama(rope_parameters=_scaled("linear", factor=2.5)),
    # 16 tokens trained, 32 read: the base has grown for every position, the first one included.
    "llama_dynamic": lambda: _llama(
        rope_parameters=_scaled("dynamic", factor=2.0), max_position_embeddings=16
    ),
    # Of 8 channels 2 keep their frequency, 2 are blended, 4 slowed; the default betas give others.
    "llama_yarn": lambda: _llama(
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 8000.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 128,
        },
        max_position_embeddings=512,
    ),
    "mistral": _mistral,
    "qwen2": lambda: _qwen(transformers.Qwen2Config, num_hidden_layers=2),
    "qwen2_sliding": lambda: _qwen(
        transformers.Qwen2Config,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "qwen3": lambda: _qwen(transformers.Qwen3Config, num_hidden_layers=2, head_dim=12),
    "gemma2": _gemma2,
    "gpt_neox": _gpt_neox,
    "gpt_neox_sequential": lambda: _gpt_neox(use_parallel_residual=False),
    "gptj": _gptj,
    "mpt": lambda: _mpt(width=32, heads=4),
    # Six heads: the slopes are picked out of eight. Clipped queries, keys and values.
    "mpt_clip": lambda: _mpt(width=36, heads=6, clip_qkv=1.0, softmax_scale=0.5),
    **SMALL,
}


def build(case: str, seed: int):
    """The case's model with weights drawn from `seed`, ready to run."""
    config = CASES[case]()
    # Falcon's eager attention adds ALiBi twice (transformers 5.24): to the mask and to the scores.
    config._attn_implementation = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    one_centred = 0.0 if config.model_type.startswith("gemma") else 1.0  # it adds the 1 itself
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "norm" not in name:
                parameter.copy_(0.2 * noise)
            elif name.endswith(("bias", "sinks")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(one_centred + 0.3 * noise)
    return model


def draw_tokens(seed: int, vocab: int = VOCAB) -> np.ndarray:
    """[2, T] int32 tokens."""
    return np.random.default_rng(seed).integers(0, vocab, (2, T), dtype=np.int32)


def decoder_layers(model):
    """The model's list of decoder layers, whatever the family calls it."""
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    for name in ("layers", "h", "blocks"):
        if hasattr(inner, name):
            return getattr(inner, name)
    raise ValueError(f"no list of layers found in {type(inner).__name__}")


@torch.no_grad()
def evaluate(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """`logits` and `hidden` as described above."""
    layers = decoder_layers(model)
    stream = []

    def before(_module, args, kwargs):
        stream.append((args[0] if args else kwargs["hidden_states"]).numpy().copy())

    def after(_module, _args, output):
        stream.append((output[0] if isinstance(output, tuple) else output).numpy().copy())

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return {"logits": logits.numpy(), "hidden": np.stack(stream)}


def store_small(path):
    """Rewrites a safetensors file in float16."""
    tensors = safetensors.numpy.load_file(path)
    halved = {name: value.astype(np.float16) for name, value in tensors.items()}
    safetensors.numpy.save_file(halved, path, {"format": "pt"})


def main(names):
    torch.set_num_threads(1)  # so that sums are in the same order on every machine
    for name in names or CASES:
        seed = 1000 + list(CASES).index(name)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(name, seed)
        if name in SMALL:
            for parameter in model.parameters():
                parameter.data = parameter.data.half().float()
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = draw_tokens(seed, model.config.vocab_size)
        expected = evaluate(model, tokens)
        if name in SMALL:
            store_small(folder / "model.safetensors")
            expected["hidden"] = expected["hidden"][:, :1]
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        np.savez_compressed(folder / "expected.npz", tokens=tokens, **expected, **versions)
        size = sum(path.stat().st_size for path in folder.iterdir())
        largest = {key: float(abs(expected[key]).max()) for key in ("logits", "hidden")}
        print(f"{name:20} {size / 1024:4.0f} KiB, largest absolute values {largest}")


if __name__ == "__main__":
    main(sys.argv[1:])
