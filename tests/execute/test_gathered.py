"""Weights that start from a Hugging Face folder and end in one are the same under every plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.models.build import build_model, initialise
from planner.spec.huggingface import spec_data_from_config
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from tests.execute.training import plan_for, trained
from tests.execute.world import run_world

safetensors = pytest.importorskip("safetensors.torch")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 51,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def exported(plans: list[Plan], folder: Path) -> None:
    for number, plan in enumerate(plans):
        flags = {"dtype": "fp32", "lr": 0.0, "steps": 1, "weights": str(folder / "start")}
        trained(plan, folder, export=str(folder / f"end-{number}"), **flags)


def test_weights_go_in_and_come_out_unchanged(tmp_path: Path) -> None:
    from planner.execute.huggingface_export import export_huggingface

    spec = ModelSpec.from_dict(spec_data_from_config(CONFIG, "tiny"))
    model = initialise(build_model(spec))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    export_huggingface(tmp_path / "start", CONFIG, model.get_parameter)
    keys = ({"tp": 4}, {"pp": 2, "tp": 2, "sp": True}, {"zero": 3, "tp": 2})
    plans = [plan_for(spec, 4, gpus=4, **each) for each in keys]
    run_world(4, exported, plans, tmp_path)
    before = safetensors.load_file(tmp_path / "start" / "model.safetensors")
    for number in range(len(keys)):
        after = safetensors.load_file(tmp_path / f"end-{number}" / "model.safetensors")
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name
        assert json.loads((tmp_path / f"end-{number}" / "config.json").read_text())["vocab_size"] == 51
