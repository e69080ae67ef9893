"""Hugging Face modules under plans: loss and every gradient are those of the library's own step, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from planner.errors import PlannerError
from planner.execute.adapters import drawn_source
from planner.execute.batches import require_no_left_padding
from planner.execute.huggingface_stage import HuggingFaceStage, spec_of_huggingface
from planner.models.build import build_model, initialise
from planner.models.huggingface import translate
from planner.spec.paths import Span, lookup
from tests.execute.huggingface_runs import module_of, run_cases
from tests.execute.layouts import decoder_splits
from tests.execute.world import run_world
from tests.models.huggingface_cases import CASES

pytest.importorskip("transformers", minversion="5.0")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "opt", "mixtral", "qwen3_moe"]
Case = tuple[str, dict[str, Any], dict[str, Any]]


def check(cases: list[Case], ranks: int) -> None:
    """Every rank of one world runs every case."""
    for wrong in run_world(ranks, run_cases, cases, ranks):
        assert not wrong, "\n".join(wrong)


def test_tensor_parallel() -> None:
    """With and without parts of the sequence between; experts over the same ranks."""
    cases: list[Case] = []
    for name in FAMILIES:
        experts = {"ep": 2} if name in ("mixtral", "qwen3_moe") else {}
        cases += [(name, {}, {"tp": 2, "sp": sp} | experts) for sp in (False, True)]
    check(cases, 2)


def test_other_layouts_of_two_ranks() -> None:
    cases: list[Case] = [(name, {}, {"zero": 3}) for name in FAMILIES]
    cases += [("llama", {}, {"pp": 2}), ("gpt2", {}, {"pp": 2}), ("gemma2", {}, {"pp": 2, "schedule": "1f1b"})]
    cases += [("opt", {"num_hidden_layers": 4}, {"pp": 2, "vpp": 2, "schedule": "zb"})]
    cases += [("llama", {}, {"cp": 2}), ("gpt2", {}, {"cp": 2}), ("mixtral", {}, {"ep": 2, "zero": 1})]
    cases += [("opt", {}, {"tp": 2, "recompute": "full"}), ("gpt2", {}, {"tp": 2, "recompute": "selective"})]
    cases += [("mixtral", {}, {"tp": 2, "etp": 2, "sp": True}), ("llama", {}, {"zero": 0})]
    check(cases, 2)


def test_four_ranks() -> None:
    check(
        [
            ("qwen3", {}, {"tp": 4, "sp": True}),  # two heads of keys
            ("llama", {"num_key_value_heads": 1}, {"tp": 2, "zero": 3}),
            ("gpt2", {}, {"tp": 2, "pp": 2, "sp": True}),
            ("qwen3_moe", {}, {"tp": 2, "ep": 2, "zero": 3, "recompute": "selective"}),
        ],
        4,
    )


def test_paths_are_those_of_the_library() -> None:
    module = module_of("gemma2", {})
    stage = HuggingFaceStage(module, Span(1, 3), first=False, last=True)
    assert all(parameter.is_meta for parameter in stage.parameters())
    every = dict(module.named_parameters())
    here = {path for path in every if path.startswith(("model.layers.1", "model.layers.2", "model.layers.3"))}
    assert {path for path, _ in stage.named_parameters()} == here | {"model.norm.weight", "lm_head.weight"}
    assert stage.plan_path("model.layers.3.mlp.up_proj") == "blocks.3.ffn.up"
    assert not any(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_speaks_of_every_module_with_weights(name: str) -> None:
    stage = HuggingFaceStage(module_of(name, {}), Span(0, 1), first=True, last=True)
    lines = decoder_splits(stage.spec)
    for path, module in stage.named_modules():
        if any(value is not None for value in module._parameters.values()):
            assert lookup(lines, stage.plan_path(path)) is not None, path


@pytest.mark.parametrize("name", ["gemma", "gpt2", "mixtral"])
def test_a_module_without_values_gets_those_of_the_bundled_model(name: str) -> None:
    """Whatever the layout: they follow from our paths."""
    with torch.device("meta"):
        module = module_of(name, {}, values=False)
    spec = spec_of_huggingface(module)
    source = drawn_source(module, 3)
    given = {path: source(path) for path, _ in module.named_parameters()}
    found = translate(given, CASES[name][0], spec)
    expected = initialise(build_model(spec), seed=3)
    assert found.keys() == dict(expected.named_parameters()).keys()
    for path, weight in expected.named_parameters():
        assert torch.equal(found[path], weight), path


def test_refused() -> None:
    with pytest.raises(PlannerError, match="runs these Hugging Face architectures") as caught:
        spec_of_huggingface(module_of("bloom", {}))
    assert caught.value.value == "bloom"
    adapted = module_of("llama", {})
    adapted.model.layers[0].mlp.up_proj.adapter = nn.Linear(2, 2)
    with pytest.raises(PlannerError, match="as transformers builds it"):
        spec_of_huggingface(adapted)
    with pytest.raises(PlannerError, match="as transformers builds it"):
        spec_of_huggingface(module_of("llama", {}).model)
    with pytest.raises(PlannerError, match="padded on the right"):
        require_no_left_padding(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]))
    require_no_left_padding(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
