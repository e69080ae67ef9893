"""Names of Hugging Face parameters beside ours, architecture by architecture.

A `*` on the left stands for one part of a name and fills the `*` on the right; `{query,key,value}` on the
right names the parameters that a fused one is made of, in the form beside it; `#` is the number of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.models.huggingface_forms import (
    ALTERNATING,
    EXPERT_HALVES,
    GROUPED_QKV,
    HALVES,
    STACKED_QKV,
    TRANSPOSED,
    TRANSPOSED_QKV,
    Form,
)

Rules = dict[str, str | tuple[str, Form]]
Table = Mapping[str, str | tuple[str, Form]]

_LLAMA: Rules = {
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.layers.*.input_layernorm.*": "blocks.*.attention_norm.*",
    "model.layers.*.self_attn.q_proj.*": "blocks.*.attention.query.*",
    "model.layers.*.self_attn.k_proj.*": "blocks.*.attention.key.*",
    "model.layers.*.self_attn.v_proj.*": "blocks.*.attention.value.*",
    "model.layers.*.self_attn.o_proj.*": "blocks.*.attention.output.*",
    "model.layers.*.self_attn.q_norm.*": "blocks.*.attention.query_norm.*",
    "model.layers.*.self_attn.k_norm.*": "blocks.*.attention.key_norm.*",
    "model.layers.*.post_attention_layernorm.*": "blocks.*.ffn_norm.*",
    "model.layers.*.mlp.gate_proj.*": "blocks.*.ffn.gate.*",
    "model.layers.*.mlp.up_proj.*": "blocks.*.ffn.up.*",
    "model.layers.*.mlp.down_proj.*": "blocks.*.ffn.down.*",
    "model.norm.*": "norm.*",
    "lm_head.*": "head.projection.*",
}

_EXPERTS: Rules = _LLAMA | {
    "model.layers.*.mlp.gate.weight": "blocks.*.ffn.router.weight",
    "model.layers.*.mlp.experts.gate_up_proj": ("blocks.*.ffn.experts.{gate,up}", EXPERT_HALVES),
    "model.layers.*.mlp.experts.down_proj": ("blocks.*.ffn.experts.down", TRANSPOSED),
    "model.layers.*.mlp.shared_expert.*_proj.*": "blocks.*.ffn.shared.*.*",  # Qwen2-MoE
    "model.layers.*.mlp.shared_expert_gate.*": "blocks.*.ffn.shared_gate.*",
}

_DEEPSEEK: Rules = _EXPERTS | {
    "model.layers.*.self_attn.q_proj.*": "blocks.*.attention.query_up.*",
    "model.layers.*.self_attn.q_a_proj.*": "blocks.*.attention.query_down.*",
    "model.layers.*.self_attn.q_a_layernorm.*": "blocks.*.attention.query_norm.*",
    "model.layers.*.self_attn.q_b_proj.*": "blocks.*.attention.query_up.*",
    "model.layers.*.self_attn.kv_a_proj_with_mqa.*": "blocks.*.attention.latent.*",
    "model.layers.*.self_attn.kv_a_layernorm.*": "blocks.*.attention.latent_norm.*",
    "model.layers.*.self_attn.kv_b_proj.*": "blocks.*.attention.expand.*",
    "model.layers.*.mlp.gate.e_score_correction_bias": "blocks.*.ffn.router.balance_bias",
    "model.layers.*.mlp.shared_experts.*_proj.*": "blocks.*.ffn.shared.*.*",
}

_FUSED_QKV: Rules = {  # BLOOM, Falcon
    "transformer.word_embeddings.weight": "embedding.tokens.weight",
    "transformer.word_embeddings_layernorm.*": "embedding.norm.*",
    "transformer.h.*.input_layernorm.*": "blocks.*.attention_norm.*",
    "transformer.h.*.ln_attn.*": "blocks.*.attention_norm.*",
    "transformer.h.*.self_attention.query_key_value.*": (
        "blocks.*.attention.{query,key,value}.*",
        GROUPED_QKV,
    ),
    "transformer.h.*.self_attention.dense.*": "blocks.*.attention.output.*",
    "transformer.h.*.post_attention_layernorm.*": "blocks.*.ffn_norm.*",
    "transformer.h.*.ln_mlp.*": "blocks.*.ffn_norm.*",
    "transformer.h.*.mlp.dense_h_to_4h.*": "blocks.*.ffn.up.*",
    "transformer.h.*.mlp.dense_4h_to_h.*": "blocks.*.ffn.down.*",
    "transformer.ln_f.*": "norm.*",
    "lm_head.*": "head.projection.*",
}


def _t5_stack(stack: str, ffn: int) -> Rules:
    """One of T5's two stacks, whose feed-forward is the given sublayer."""
    block = f"{stack}.block.*.layer"
    ours = f"{stack}_blocks.*"
    table: Rules = {
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": f"{stack}_bias.table.weight",
        f"{block}.0.layer_norm.*": f"{ours}.attention_norm.*",
        f"{block}.{ffn}.layer_norm.*": f"{ours}.ffn_norm.*",
        f"{stack}.final_layer_norm.*": f"{stack}_norm.*",
        f"{block}.{ffn}.DenseReluDense.wi.*": f"{ours}.ffn.up.*",
        f"{block}.{ffn}.DenseReluDense.wi_0.*": f"{ours}.ffn.gate.*",
        f"{block}.{ffn}.DenseReluDense.wi_1.*": f"{ours}.ffn.up.*",
        f"{block}.{ffn}.DenseReluDense.wo.*": f"{ours}.ffn.down.*",
    }
    return table | {
        f"{block}.{sublayer}.{theirs}.{letter}.weight": f"{ours}.{name}.{role}.weight"
        for sublayer, theirs, name in ((0, "SelfAttention", "attention"), (1, "EncDecAttention", "cross"))
        for letter, role in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    }


TABLES: dict[str, Table] = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embedding.tokens.weight",
        "bert.embeddings.position_embeddings.weight": "embedding.positions.weight",
        "bert.embeddings.token_type_embeddings.weight": "embedding.types.weight",
        "bert.embeddings.LayerNorm.*": "embedding.norm.*",
        "bert.encoder.layer.*.attention.self.*.*": "blocks.*.attention.*.*",
        "bert.encoder.layer.*.attention.output.dense.*": "blocks.*.attention.output.*",
        "bert.encoder.layer.*.attention.output.LayerNorm.*": "blocks.*.attention_norm.*",
        "bert.encoder.layer.*.intermediate.dense.*": "blocks.*.ffn.up.*",
        "bert.encoder.layer.*.output.dense.*": "blocks.*.ffn.down.*",
        "bert.encoder.layer.*.output.LayerNorm.*": "blocks.*.ffn_norm.*",
        "cls.predictions.transform.dense.*": "head.dense.*",
        "cls.predictions.transform.LayerNorm.*": "head.norm.*",
        "cls.predictions.bias": "head.projection.bias",
    },
    "bloom": _FUSED_QKV,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "falcon": _FUSED_QKV,
    "gemma": _LLAMA,
    "gemma2": _LLAMA
    | {
        "model.layers.*.post_attention_layernorm.*": "blocks.*.attention_post_norm.*",
        "model.layers.*.pre_feedforward_layernorm.*": "blocks.*.ffn_norm.*",
        "model.layers.*.post_feedforward_layernorm.*": "blocks.*.ffn_post_norm.*",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding.tokens.weight",
        "transformer.wpe.weight": "embedding.positions.weight",
        "transformer.h.*.ln_1.*": "blocks.*.attention_norm.*",
        "transformer.h.*.attn.c_attn.*": ("blocks.*.attention.{query,key,value}.*", TRANSPOSED_QKV),
        "transformer.h.*.attn.c_proj.*": ("blocks.*.attention.output.*", TRANSPOSED),
        "transformer.h.*.ln_2.*": "blocks.*.ffn_norm.*",
        "transformer.h.*.mlp.c_fc.*": ("blocks.*.ffn.up.*", TRANSPOSED),
        "transformer.h.*.mlp.c_proj.*": ("blocks.*.ffn.down.*", TRANSPOSED),
        "transformer.ln_f.*": "norm.*",
        "lm_head.*": "head.projection.*",
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": "embedding.tokens.weight",
        "gpt_neox.layers.*.input_layernorm.*": "blocks.*.attention_norm.*",
        "gpt_neox.layers.*.attention.query_key_value.*": (
            "blocks.*.attention.{query,key,value}.*",
            GROUPED_QKV,
        ),
        "gpt_neox.layers.*.attention.dense.*": "blocks.*.attention.output.*",
        "gpt_neox.layers.*.post_attention_layernorm.*": "blocks.*.ffn_norm.*",
        "gpt_neox.layers.*.mlp.dense_h_to_4h.*": "blocks.*.ffn.up.*",
        "gpt_neox.layers.*.mlp.dense_4h_to_h.*": "blocks.*.ffn.down.*",
        "gpt_neox.final_layer_norm.*": "norm.*",
        "lm_head.*": "head.projection.*",
    },
    "gpt_oss": _LLAMA
    | {
        "model.layers.*.self_attn.sinks": "blocks.*.attention.core.sinks",
        "model.layers.*.mlp.router.*": "blocks.*.ffn.router.*",
        "model.layers.*.mlp.experts.gate_up_proj": ("blocks.*.ffn.experts.{gate,up}", ALTERNATING),
        "model.layers.*.mlp.experts.gate_up_proj_bias": (
            "blocks.*.ffn.experts.{gate_bias,up_bias}",
            ALTERNATING,
        ),
        "model.layers.*.mlp.experts.down_proj": "blocks.*.ffn.experts.down",
        "model.layers.*.mlp.experts.down_proj_bias": "blocks.*.ffn.experts.down_bias",
    },
    "gptj": {
        "transformer.wte.weight": "embedding.tokens.weight",
        "transformer.h.*.ln_1.*": "blocks.*.attention_norm.*",
        "transformer.h.*.attn.q_proj.*": "blocks.*.attention.query.*",
        "transformer.h.*.attn.k_proj.*": "blocks.*.attention.key.*",
        "transformer.h.*.attn.v_proj.*": "blocks.*.attention.value.*",
        "transformer.h.*.attn.out_proj.*": "blocks.*.attention.output.*",
        "transformer.h.*.mlp.fc_in.*": "blocks.*.ffn.up.*",
        "transformer.h.*.mlp.fc_out.*": "blocks.*.ffn.down.*",
        "transformer.ln_f.*": "norm.*",
        "lm_head.*": "head.projection.*",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _EXPERTS,
    "mpt": {
        "transformer.wte.weight": "embedding.tokens.weight",
        "transformer.blocks.*.norm_1.*": "blocks.*.attention_norm.*",
        "transformer.blocks.*.attn.Wqkv.*": ("blocks.*.attention.{query,key,value}.*", STACKED_QKV),
        "transformer.blocks.*.attn.out_proj.*": "blocks.*.attention.output.*",
        "transformer.blocks.*.norm_2.*": "blocks.*.ffn_norm.*",
        "transformer.blocks.*.ffn.up_proj.*": "blocks.*.ffn.up.*",
        "transformer.blocks.*.ffn.down_proj.*": "blocks.*.ffn.down.*",
        "transformer.norm_f.*": "norm.*",
        "lm_head.*": "head.projection.*",
    },
    "nemotron": _LLAMA,
    "opt": {
        "model.decoder.embed_tokens.weight": "embedding.tokens.weight",
        "model.decoder.embed_positions.weight": "embedding.positions.weight",
        "model.decoder.layers.*.self_attn_layer_norm.*": "blocks.*.attention_norm.*",
        "model.decoder.layers.*.self_attn.q_proj.*": "blocks.*.attention.query.*",
        "model.decoder.layers.*.self_attn.k_proj.*": "blocks.*.attention.key.*",
        "model.decoder.layers.*.self_attn.v_proj.*": "blocks.*.attention.value.*",
        "model.decoder.layers.*.self_attn.out_proj.*": "blocks.*.attention.output.*",
        "model.decoder.layers.*.final_layer_norm.*": "blocks.*.ffn_norm.*",
        "model.decoder.layers.*.fc1.*": "blocks.*.ffn.up.*",
        "model.decoder.layers.*.fc2.*": "blocks.*.ffn.down.*",
        "model.decoder.final_layer_norm.*": "norm.*",
        "lm_head.*": "head.projection.*",
    },
    "phi": _LLAMA
    | {
        "model.layers.*.self_attn.dense.*": "blocks.*.attention.output.*",
        "model.layers.*.self_attn.q_layernorm.*": "blocks.*.attention.query_norm.*",
        "model.layers.*.self_attn.k_layernorm.*": "blocks.*.attention.key_norm.*",
        "model.layers.*.mlp.fc1.*": "blocks.*.ffn.up.*",
        "model.layers.*.mlp.fc2.*": "blocks.*.ffn.down.*",
        "model.final_layernorm.*": "norm.*",
    },
    "phi3": _LLAMA
    | {
        "model.layers.*.self_attn.qkv_proj.*": ("blocks.*.attention.{query,key,value}.*", STACKED_QKV),
        "model.layers.*.mlp.gate_up_proj.*": ("blocks.*.ffn.{gate,up}.*", HALVES),
    },
    "qwen2": _LLAMA,
    "qwen2_moe": _EXPERTS,
    "qwen3": _LLAMA,
    "qwen3_moe": _EXPERTS,
    "t5": {"shared.weight": "embedding.tokens.weight", "lm_head.*": "head.projection.*"}
    | {"decoder.block.*.layer.1.layer_norm.*": "decoder_blocks.*.cross_norm.*"}
    | _t5_stack("encoder", ffn=1)
    | _t5_stack("decoder", ffn=2),
    "vit": {
        "vit.embeddings.cls_token": "class_token",
        "vit.embeddings.position_embeddings": "position_table",
        "vit.embeddings.patch_embeddings.projection.*": "patches.*",
        "vit.layers.*.layernorm_before.*": "blocks.*.attention_norm.*",
        "vit.layers.*.attention.q_proj.*": "blocks.*.attention.query.*",
        "vit.layers.*.attention.k_proj.*": "blocks.*.attention.key.*",
        "vit.layers.*.attention.v_proj.*": "blocks.*.attention.value.*",
        "vit.layers.*.attention.o_proj.*": "blocks.*.attention.output.*",
        "vit.layers.*.layernorm_after.*": "blocks.*.ffn_norm.*",
        "vit.layers.*.mlp.fc1.*": "blocks.*.ffn.up.*",
        "vit.layers.*.mlp.fc2.*": "blocks.*.ffn.down.*",
        "vit.layernorm.*": "norm.*",
        "classifier.*": "head.*",
    },
}

# Files differ from modules where experts stand one by one in the file, `#` being the number of each.
_LISTED: Rules = {
    "model.layers.*.mlp.experts.#.gate_proj.weight": ("blocks.*.ffn.experts.gate", TRANSPOSED),
    "model.layers.*.mlp.experts.#.up_proj.weight": ("blocks.*.ffn.experts.up", TRANSPOSED),
    "model.layers.*.mlp.experts.#.down_proj.weight": ("blocks.*.ffn.experts.down", TRANSPOSED),
}
_LISTED_MIXTRAL: Rules = {
    "model.layers.*.block_sparse_moe.gate.weight": "blocks.*.ffn.router.weight",
    "model.layers.*.block_sparse_moe.experts.#.w1.weight": ("blocks.*.ffn.experts.gate", TRANSPOSED),
    "model.layers.*.block_sparse_moe.experts.#.w3.weight": ("blocks.*.ffn.experts.up", TRANSPOSED),
    "model.layers.*.block_sparse_moe.experts.#.w2.weight": ("blocks.*.ffn.experts.down", TRANSPOSED),
}


def _listed(table: Table, experts: Table) -> Table:
    """A table of files: without what stacks experts."""
    replaced = {rule if isinstance(rule, str) else rule[0] for rule in experts.values()}
    replaced.add("blocks.*.ffn.experts.{gate,up}")
    kept = {
        name: rule for name, rule in table.items() if (rule if isinstance(rule, str) else rule[0]) not in replaced
    }
    return kept | dict(experts)


FILE_TABLES: Mapping[str, Table] = TABLES | {
    "deepseek_v2": _listed(_DEEPSEEK, _LISTED),
    "deepseek_v3": _listed(_DEEPSEEK, _LISTED),
    "kimi_k2": _listed(_DEEPSEEK, _LISTED),
    "gpt_neox": {name.replace("lm_head", "embed_out"): rule for name, rule in TABLES["gpt_neox"].items()},
    "mixtral": _listed(_EXPERTS, _LISTED_MIXTRAL),
    "qwen2_moe": _listed(_EXPERTS, _LISTED),
    "qwen3_moe": _listed(_EXPERTS, _LISTED),
}
