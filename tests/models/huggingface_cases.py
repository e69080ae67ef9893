"""Small configurations of every Hugging Face architecture that the bundled modules cover."""

from __future__ import annotations

from typing import Any

BATCH, LENGTH, VOCAB = 2, 24, 96

_TRUNK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_GROUPED = _TRUNK | {"num_key_value_heads": 2, "head_dim": 24, "attention_dropout": 0.0}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LATENT = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
_T5 = {
    "d_model": 64,
    "d_kv": 12,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": VOCAB,
}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}

# name → model type and what its config.json says; all else is the type's default
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _TRUNK),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": VOCAB}),
    "deepseek_v2": (
        "deepseek_v2",
        _TRUNK | _LATENT | {"topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "deepseek_v3": ("deepseek_v3", _TRUNK | _LATENT),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        _TRUNK | _LATENT | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "falcon_40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_11b": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_7b": ("falcon", _FALCON | {"multi_query": True, "parallel_attn": True, "bias": True}),
    "falcon_sequential": ("falcon", _FALCON | {"multi_query": False, "parallel_attn": False}),
    "gemma": ("gemma", _GROUPED),
    "gemma2": (
        "gemma2",
        _GROUPED
        | {"num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _TRUNK | {"rotary_pct": 0.5}),
    "gpt_neox_sequential": ("gpt_neox", _TRUNK | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "gpt_oss": (
        "gpt_oss",
        _GROUPED
        | {"num_hidden_layers": 4, "sliding_window": 7, "num_local_experts": 6, "num_experts_per_tok": 2}
        | {"swiglu_limit": 1.5, "rope_parameters": _YARN | {"truncate": False}},
    ),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8}),
    "llama": ("llama", _GROUPED),
    "llama3": ("llama", _GROUPED | {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama_linear": (
        "llama",
        _GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 7}),
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 64, "vocab_size": VOCAB}),
    "nemotron": ("nemotron", _GROUPED | {"partial_rotary_factor": 0.5}),
    "opt": ("opt", {k: v for k, v in _TRUNK.items() if k != "intermediate_size"} | {"ffn_dim": 80}),
    "phi": ("phi", _TRUNK | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("phi3", _TRUNK | {"num_key_value_heads": 2, "sliding_window": 7, "pad_token_id": 0}),
    "qwen2": ("qwen2", _TRUNK | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        _TRUNK | _EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 56},
    ),
    "qwen3": ("qwen3", _GROUPED),
    "qwen3_moe": ("qwen3_moe", _GROUPED | _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "t5": ("t5", _T5),
    "t5_gated": ("t5", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "vit": (
        "vit",
        {k: v for k, v in _TRUNK.items() if k not in ("vocab_size", "max_position_embeddings")}
        | {"image_size": 32, "patch_size": 8},
    ),
}
