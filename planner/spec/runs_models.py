"""The model of a row → the keys of a model spec.

What the row states wins. What it does not state comes from the bundled spec of that model, provided that the
shape the row does state is that spec's; without one, from what such models have in common.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from planner.spec.files import bundled_names
from planner.spec.model import ModelSpec, load_bundled
from planner.spec.runs_csv import Record

_ALIASES = {  # plain spelling: bundled spec of the same shape
    "llama38b": "llama3.1-8b",
    "llama370b": "llama3.1-70b",
    "llama3405b": "llama3.1-405b",
    "bloom": "bloom-176b",
    "gpt175b": "gpt3-175b",
    "nemotron15b": "nemotron4-15b",
    "nemotron340b": "nemotron4-340b",
}
_VARIANT = re.compile(r"[-_ ](?:proxy|sft|lora|pretrain|base|instruct|\d+l(?:ayers)?)(?=[-_ ]|$)", re.I)
_PROXY = re.compile(r"proxy|[-_ ]\d+l(?:ayers)?$", re.I)  # a model with some of its layers taken out
_USUAL_VOCAB = 51_200  # GPT-2's vocabulary as Megatron pads it for 8-way tensor parallelism
_KEYS_OF_THE_BUILT_MODEL = ("parameters", "reference", "vision")


class UnknownModelError(Exception):
    """Neither the row nor a bundled spec says what the model is; says what is missing."""


def model_of(record: Record, *, seq_len: int, unfused: bool = False, dropout: float = 0.0) -> dict[str, Any]:
    """Keys of a model spec. Old software has unfused attention and dropout, which no column states."""
    stated = _stated(record)
    model = _bundled(record, stated)
    if model and _ungated(model) and _ungated(stated):
        del stated["ffn_kind"]  # tables write gelu for any feed-forward without a gate
    model = model or _usual(record, stated)
    moe = model.pop("moe", None)
    experts = stated.pop("moe", None)
    model |= stated
    if experts is not None or moe is not None:
        model["moe"] = _experts(moe or {}, experts or {}, model)
        if not stated.get("ffn") and not model.get("ffn"):
            model["ffn"] = model["moe"]["expert_ffn"]
    if model.get("mla"):
        model.pop("kv_heads", None)
    if model.get("positions", "learned") == "learned":
        model["max_positions"] = max(seq_len, int(model.get("max_positions", 0)))
    if unfused:
        model["attention"] = "unfused"
    if dropout:
        model |= {"dropout": dropout, "attention_dropout": dropout}
    model["name"] = record.text("model", "unnamed")
    return model


def _stated(record: Record) -> dict[str, Any]:
    """What the row's own columns say."""
    found: dict[str, Any] = {
        key: record.whole(key)
        for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
        if record.whole(key)
    }
    kind = record.text("ffn_type", record.text("ffn_kind")).lower()
    if kind:
        found["ffn_kind"] = kind
    experts = {"experts": record.whole("experts"), "top_k": record.whole("topk") or record.whole("top_k"),
               "expert_ffn": record.whole("moe_ffn")}  # fmt: skip
    if experts["experts"] > 1:
        found["moe"] = {key: value for key, value in experts.items() if value}
    return found


def _bundled(record: Record, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The bundled spec of that name where the stated shape is its own; a proxy may have fewer layers."""
    name = record.text("model")
    spec = _spec_called(_VARIANT.sub("", name)) if name else None
    if spec is None:
        return {}
    shape = ("hidden", "heads", "ffn") if _PROXY.search(name) else ("hidden", "heads", "ffn", "layers")
    for key in shape:
        if key == "ffn" and spec.moe is not None:
            continue
        if key in stated and stated[key] != getattr(spec, key):
            return {}
    data = {key: value for key, value in spec.to_dict().items() if key not in _KEYS_OF_THE_BUILT_MODEL}
    if "moe" in data and "layers" in stated:
        dense = data["moe"].get("first_dense_layers", 0)
        data["moe"] = {**data["moe"], "first_dense_layers": min(dense, stated["layers"])}
    return data


def _ungated(model: Mapping[str, Any]) -> bool:
    return model.get("ffn_kind") in ("gelu", "relu", "relu2")


def _usual(record: Record, stated: Mapping[str, Any]) -> dict[str, Any]:
    """A GPT, or a Llama where the feed-forward has a gate, of the stated shape."""
    for key in ("layers", "hidden", "heads"):
        if key not in stated:
            name = record.text("model", "(none)")
            raise UnknownModelError(f"{key} of the model are not given, and no bundled spec is {name}")
    gated = stated.get("ffn_kind", "swiglu" if "moe" in stated else "gelu") in ("swiglu", "geglu")
    common: dict[str, Any] = {"vocab": _USUAL_VOCAB, "max_positions": 2048, "ffn": 4 * stated["hidden"]}
    if "moe" in stated and "ffn" not in stated:
        del common["ffn"]
    if gated:
        return common | {"ffn_kind": "swiglu", "norm": "rmsnorm", "positions": "rope", "bias": False}
    return common | {"ffn_kind": "gelu", "tied_embeddings": True}


def _experts(bundled: Mapping[str, Any], stated: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    experts = {**bundled, **stated}
    if "expert_ffn" not in experts and model.get("ffn"):
        experts["expert_ffn"] = model["ffn"]
    for key in ("experts", "top_k", "expert_ffn"):
        if key not in experts:
            raise UnknownModelError(f"{key} of the experts is not given")
    return experts


def _spec_called(name: str) -> ModelSpec | None:
    """A bundled spec by a spelling of its name: Llama3.1-70B, llama3.1_70b and LLAMA 3.1 70B are one."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    found = _ALIASES.get(plain) or _bundled_by_plain_name().get(plain)
    return _loaded(found) if found else None


@functools.cache
def _bundled_by_plain_name() -> dict[str, str]:
    return {re.sub(r"[^a-z0-9]", "", name): name for name in bundled_names("model_specs")}


@functools.cache
def _loaded(name: str) -> ModelSpec:
    return ModelSpec.from_dict(load_bundled(name))
