"""A model spec → the `config.json` of a Hugging Face type that builds it: written, read back and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.files import read_text
from planner.spec.huggingface import spec_data_from_config
from planner.spec.model import ModelSpec

_RMS_KINDS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
_PLAIN_KINDS = {"gelu": {"tanh": "gelu_new", "exact": "gelu"}, "relu": {"tanh": "relu", "exact": "relu"}}


def config_at(places: Iterable[str], spec: ModelSpec) -> dict[str, Any]:
    """The configuration that the first of some files or folders holds, else that of the first type that fits."""
    given = [Path(place) for place in places if place]
    for path in (place / "config.json" if place.is_dir() else place for place in given):
        if path.name.endswith(".json") and path.is_file():
            config: dict[str, Any] = json.loads(read_text(path))
            return config
    return config_from_spec(spec)


def config_from_spec(spec: ModelSpec, model_type: str = "") -> dict[str, Any]:
    """Of the type, or else the first that builds this model, whatever its name and its kernels."""
    wanted = dataclasses.replace(spec, name="", reference="", parameters=0, attention="flash")
    for (tried, architecture), write in _WRITERS.items():
        if model_type not in ("", tried):
            continue
        config = {"architectures": [architecture], "model_type": tried} | write(spec)
        if _read(config) == wanted:
            return config
    raise PlannerError(
        "a model without a config.json has that of one of " + ", ".join(kind for kind, _ in _WRITERS),
        value=spec.name,
        remedy="give the config.json of the model",
        key="model",
    )


def _read(config: Mapping[str, Any]) -> ModelSpec | None:
    """What a configuration stands for; nothing where its type cannot have such sizes."""
    try:
        return dataclasses.replace(ModelSpec.from_dict(spec_data_from_config(config)), name="")
    except PlannerError:
        return None


def _rms(spec: ModelSpec) -> dict[str, Any]:
    """What Llama and its kin have in common, in the spelling that every version reads."""
    return {
        "attention_dropout": spec.attention_dropout,
        "head_dim": spec.head_dim,
        "hidden_act": _RMS_KINDS.get(spec.ffn_kind),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": _rope_scaling(spec),
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tied_embeddings,
        "vocab_size": spec.vocab,
    }


def _rope_scaling(spec: ModelSpec) -> dict[str, Any] | None:
    rope = spec.rope
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling |= {"attention_factor": rope.magnitude} if rope.magnitude else {}
    if rope.original_positions:
        scaling["original_max_position_embeddings"] = rope.original_positions
    return scaling


def _llama(spec: ModelSpec) -> dict[str, Any]:
    return _rms(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.ffn_bias}


def _windowed(spec: ModelSpec) -> dict[str, Any]:
    return _rms(spec) | {"sliding_window": spec.sliding_window or None}


def _mixtral(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    experts = {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k} if moe else {}
    return _windowed(spec) | experts | ({"intermediate_size": moe.expert_ffn} if moe else {})


def _qwen3(spec: ModelSpec) -> dict[str, Any]:
    return _rms(spec) | {"attention_bias": spec.qkv_bias}


def _qwen3_moe(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {}
    return _qwen3(spec) | {
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(range(moe.first_dense_layers)),
        "moe_intermediate_size": moe.expert_ffn,
        "norm_topk_prob": moe.normalize_top_k,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
    }


def _gemma2(spec: ModelSpec) -> dict[str, Any]:
    scalar = round(spec.attention_scale**-2, 6) if spec.attention_scale else spec.head_dim
    scalar = int(scalar) if scalar == int(scalar) else scalar  # as transformers has it
    return _windowed(spec) | {
        "attn_logit_softcapping": spec.attention_softcap or None,
        "final_logit_softcapping": spec.logit_softcap or None,
        "hidden_activation": _RMS_KINDS.get(spec.ffn_kind),
        "query_pre_attn_scalar": scalar,
    }


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "activation_function": _PLAIN_KINDS.get(spec.ffn_kind, {}).get(spec.gelu),
        "attn_pdrop": spec.attention_dropout,
        "embd_pdrop": spec.dropout,
        "layer_norm_epsilon": spec.norm_eps,
        "n_embd": spec.hidden,
        "n_head": spec.heads,
        "n_inner": spec.ffn,
        "n_layer": spec.layers,
        "n_positions": spec.max_positions,
        "resid_pdrop": spec.dropout,
        "tie_word_embeddings": spec.tied_embeddings,
        "vocab_size": spec.vocab,
    }


def _opt(spec: ModelSpec) -> dict[str, Any]:
    return {
        "activation_function": _PLAIN_KINDS.get(spec.ffn_kind, {}).get(spec.gelu),
        "attention_dropout": spec.attention_dropout,
        "do_layer_norm_before": spec.norm_position == "pre",
        "dropout": spec.dropout,
        "enable_bias": spec.bias,
        "ffn_dim": spec.ffn,
        "hidden_size": spec.hidden,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "tie_word_embeddings": spec.tied_embeddings,
        "vocab_size": spec.vocab,
        "word_embed_proj_dim": spec.hidden,
    }


_WRITERS: Mapping[tuple[str, str], Callable[[ModelSpec], dict[str, Any]]] = {
    ("llama", "LlamaForCausalLM"): _llama,
    ("mistral", "MistralForCausalLM"): _windowed,
    ("mixtral", "MixtralForCausalLM"): _mixtral,
    ("qwen2", "Qwen2ForCausalLM"): _rms,
    ("qwen3", "Qwen3ForCausalLM"): _qwen3,
    ("qwen3_moe", "Qwen3MoeForCausalLM"): _qwen3_moe,
    ("gemma", "GemmaForCausalLM"): _rms,
    ("gemma2", "Gemma2ForCausalLM"): _gemma2,
    ("gpt2", "GPT2LMHeadModel"): _gpt2,
    ("opt", "OPTForCausalLM"): _opt,
}
