"""Configurations written for bundled specs are read back as the same model."""

from __future__ import annotations

import dataclasses

import pytest

from planner.errors import PlannerError
from planner.spec.huggingface import spec_data_from_config
from planner.spec.huggingface_config import config_from_spec
from planner.spec.model import ModelSpec, load_bundled
from tests.tiny import tiny_spec

TYPES = {
    "gemma2-9b": "gemma2",
    "gpt2": "gpt2",
    "llama2-7b": "llama",
    "llama3.1-405b": "llama",
    "megatron-1t": "gpt2",
    "mistral-7b": "mistral",
    "mixtral-8x7b": "mixtral",
    "opt-1.3b": "opt",
    "qwen2.5-72b": "qwen2",
    "qwen3-8b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
}


@pytest.mark.parametrize("name", TYPES)
def test_read_back(name: str) -> None:
    spec = ModelSpec.from_dict(load_bundled(name))
    config = config_from_spec(spec)
    assert config["model_type"] == TYPES[name]
    again = ModelSpec.from_dict(spec_data_from_config(config))
    same = dataclasses.replace(
        again, name=spec.name, reference=spec.reference, parameters=spec.parameters, attention=spec.attention
    )
    assert same == spec


@pytest.mark.parametrize("kind", ["bloom", "falcon", "nemotron", "gpt_oss", "deepseek"])
def test_a_model_of_no_type_is_refused(kind: str) -> None:
    with pytest.raises(PlannerError, match=r"without a config\.json"):
        config_from_spec(tiny_spec(kind))
