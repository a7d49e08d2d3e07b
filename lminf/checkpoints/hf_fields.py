"""Fields of a config.json: what each may be, and which change nothing in what the model computes.

What is in neither table is refused by name.
"""

from typing import Annotated, Any

from lminf.attention.rope import Length
from lminf.checkpoints import hf_rotary
from lminf.checkpoints.config_fields import Meaningless
from lminf.models.spec import Cap, Epsilon, Layers, Multiplier, Size
from lminf.ranges import Range

# What each field may be; those of nested sections beside the functions that read them.
SHAPE: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
            "num_key_value_heads", "head_dim", "n_embd", "n_head", "n_inner", "rotary_dim",
            "d_model", "n_heads", "expansion_ratio", "moe_intermediate_size", "num_experts",
            "num_local_experts", "num_experts_per_tok", "ffn_dim", "ffn_hidden_size", "n_embed",
            "num_kv_heads", "sliding_window_pattern",
        ),
        Size,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), Layers),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window"), Length
    ),
    "max_window_layers": Annotated[int, Range(min=0, max=2**16)],
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Epsilon),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), Cap),
    **dict.fromkeys(
        (
            "query_pre_attn_scalar", "swiglu_limit", "embedding_multiplier", "residual_multiplier",
            "attention_multiplier", "logits_scaling", "logit_scale",
        ),
        Multiplier,
    ),
    "no_rope_layers": list[int],
    "num_ln_in_parallel_attn": Annotated[int, Range(min=1, max=2)],
    **dict.fromkeys(
        (
            "mlp_bias", "attention_bias", "tie_word_embeddings", "use_sliding_window",
            "use_parallel_residual", "use_qkv_bias", "qk_layernorm", "use_qk_norm",
            "norm_topk_prob", "enable_bias", "alibi", "bias", "multi_query",
            "new_decoder_architecture", "parallel_attn",
        ),
        bool,
    ),
    **dict.fromkeys(
        (
            "model_type", "hidden_act", "hidden_activation", "activation_function", "activation",
        ),
        str,
    ),
    "layer_types": list[str],
    "attn_config": dict,
    **hf_rotary.SHAPE,
}  # fmt: skip
ATTENTION_SHAPE: dict[str, Any] = {  # of MPT's attn_config
    "clip_qkv": Cap,
    "softmax_scale": Multiplier,
    "alibi_bias_max": Annotated[float, Range(above=0, max=1e3)],
}

# Bookkeeping, training, generation, token numbers (they belong to the tokenizer): what
# PretrainedConfig and GenerationConfig of transformers 4 and 5 write, and other libraries beside
# them. Dropout is off when a model is read.
_ANY_VALUE = (
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_commit_hash", "_experts_implementation", "_flash_attn_2_enabled", "_from_model_config",
    "_name_or_path", "architectures", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "attention_dropout", "attn_impl",
    "attn_implementation", "attn_pdrop", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_config", "cache_implementation", "classifier_dropout", "compile_config",
    "constraints", "continuous_batching_config", "decoder_start_token_id", "disable_compile",
    "diversity_penalty", "do_sample", "dola_layers", "dropout", "dtype", "early_stopping",
    "emb_pdrop", "embd_pdrop", "embedding_fraction", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "finetuning_task", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "guidance_scale", "hidden_dropout", "id2label",
    "init_config", "init_device", "init_std", "initializer_range", "is_assistant", "is_decoder",
    "is_llama_config", "keys_to_ignore_at_inference", "label2id", "layerdrop", "length_penalty",
    "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens",
    "max_sequence_length", "max_time", "min_length", "min_new_tokens", "min_p", "model_max_length",
    "n_ctx", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits",
    "output_past", "output_scores", "pad_token_id", "penalty_alpha", "prefill_chunk_size", "prefix",
    "pretraining_tp", "problem_type", "prompt_lookup_num_tokens", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "sep_token_id", "sequence_bias", "speculation_type", "stop_strings",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "suppress_tokens", "target_lookbehind", "task_specific_params",
    "temperature", "tf_legacy_loss", "token_healing", "tokenizer_class", "tokenizer_name", "top_h",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", "use_flash_attention_2", "use_flash_attn", "use_mtp", "verbose",
    "watermarking_config",
)  # fmt: skip

MEANINGLESS: Meaningless = dict.fromkeys(_ANY_VALUE) | {
    # Of encoder-decoders, in every PretrainedConfig.
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    # Of relatives of the families that are read, switched off.
    "embedding_multiplier": (1.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "model_type": ("",),  # of a nested section
    "moe_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "qk_layernorm": (False,),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
