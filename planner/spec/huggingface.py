"""A Hugging Face `config.json` → the data of a spec, without transformers or torch.

Keys that change neither shapes nor FLOPs nor logits are ignored: token ids, `initializer_range`, `dtype`,
`quantization_config` (precision belongs to the workload), `pretraining_tp`, `num_nextn_predict_layers` (a
module for predicting further tokens stands beside the model). A variant that no spec can express is refused
rather than approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import PlannerError
from planner.spec import huggingface_gpt as gpt
from planner.spec import huggingface_llama as llama
from planner.spec.huggingface_defaults import DEFAULTS
from planner.spec.huggingface_keys import Keys
from planner.spec.huggingface_parts import Spec

READERS: Mapping[str, Callable[[Keys], Spec]] = {
    "bert": gpt.bert,
    "bloom": gpt.bloom,
    "deepseek_v2": llama.deepseek_v2,
    "deepseek_v3": llama.deepseek_v3,
    "falcon": gpt.falcon,
    "gemma": llama.gemma,
    "gemma2": llama.gemma2,
    "gpt2": gpt.gpt2,
    "gpt_neox": gpt.gpt_neox,
    "gpt_oss": llama.gpt_oss,
    "gptj": gpt.gptj,
    "kimi_k2": llama.deepseek_v3,
    "llama": llama.llama,
    "mistral": llama.mistral,
    "mixtral": llama.mixtral,
    "mpt": gpt.mpt,
    "nemotron": gpt.nemotron,
    "opt": gpt.opt,
    "phi": gpt.phi,
    "phi3": llama.phi3,
    "qwen2": llama.qwen2,
    "qwen2_moe": llama.qwen2_moe,
    "qwen3": llama.qwen3,
    "qwen3_moe": llama.qwen3_moe,
    "t5": gpt.t5,
    "vit": gpt.vit,
}

# the head that a spec of each type has; a file of a model without a head is planned with it
_HEADS = {
    "bert": ("ForMaskedLM", "ForPreTraining", "Model"),
    "t5": ("ForConditionalGeneration", "WithLMHeadModel", "Model"),
    "vit": ("ForImageClassification", "Model"),
}
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "Model")
_OTHER_MODELS = ("DoubleHeadsModel", "EncoderModel")


def is_huggingface_config(data: Any) -> bool:
    """Whether data looks like a `config.json` rather than like a spec."""
    return isinstance(data, Mapping) and ("model_type" in data or "architectures" in data)


def spec_data_from_config(config: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """What `ModelSpec.from_dict` takes. What the file leaves out is the documented default of its type."""
    if not isinstance(config, Mapping):
        raise PlannerError(
            "a Hugging Face config.json is a mapping of keys to values",
            value=config,
            remedy="give the config.json of a model",
        )
    model_type = model_type_of(config)
    keys = Keys(config, DEFAULTS[model_type])
    _check_head(keys, model_type)
    keys.refuse_unless("pruned_heads", {}, "layers with fewer heads than others are not built")
    keys.refuse_unless("per_layer_config", {}, "layers that differ in their configuration are not built")
    return {"name": name or model_type} | READERS[model_type](keys)


def model_type_of(config: Mapping[str, Any]) -> str:
    """`model_type`, or where it is missing the type after which the architecture is named."""
    stated = config.get("model_type")
    if stated is None:
        architecture = _architecture(Keys(config))
        named = [
            kind
            for kind in READERS
            for head in _HEADS.get(kind, _CAUSAL_HEADS)
            if architecture.lower() == kind.replace("_", "") + head.lower()
        ]
        stated = named[0] if named else architecture
    if not isinstance(stated, str) or stated not in READERS:
        raise PlannerError(
            "the model type is one of " + ", ".join(sorted(READERS)),
            value=stated or "no model_type",
            remedy="give a spec file or file.py:callable",
            key="model_type",
        )
    return stated


def _architecture(keys: Keys) -> str:
    names = keys.items("architectures")
    if not all(isinstance(architecture, str) for architecture in names):
        raise keys.wrong("architectures", names, "a list of class names")
    return names[0] if names else ""


def _check_head(keys: Keys, model_type: str) -> None:
    """A head for classification or question answering has other shapes than the one that a spec has."""
    architecture, heads = _architecture(keys), _HEADS.get(model_type, _CAUSAL_HEADS)
    if architecture and (not architecture.endswith(heads) or architecture.endswith(_OTHER_MODELS)):
        raise PlannerError(
            "the heads that are built for this model type are " + ", ".join(heads),
            value=architecture,
            remedy=f"let architectures end in {heads[0]}, or leave it out, to plan with that head",
            key="architectures",
        )
