"""Checkpoints of Hugging Face: read as their own modules hold them, refused where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from planner.errors import PlannerError
from planner.execute.huggingface_export import export_huggingface
from planner.execute.huggingface_folder import HuggingFaceFolder
from planner.models.build import build_model
from planner.models.huggingface import translate, weights_of
from planner.spec.huggingface_config import config_from_spec
from tests.models.huggingface_cases import CASES
from tests.tiny import tiny_spec

transformers = pytest.importorskip("transformers", minversion="5.0")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "opt", "mixtral", "qwen3_moe"]
OTHERS = ["bloom", "deepseek_v3", "falcon_11b", "gpt_neox", "gptj", "mpt", "phi3", "qwen2_moe"]


def saved(name: str, folder: Path, **options: Any) -> nn.Module:
    """A Hugging Face module with random weights, and its checkpoint in the folder."""
    model_type, config = CASES[name]
    built = transformers.AutoConfig.for_model(model_type, **config)
    module = transformers.AutoModelForCausalLM.from_config(built)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights_of(module).values():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    module.save_pretrained(folder, **options)
    return module


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_weights_are_those_of_the_module(name: str, tmp_path: Path) -> None:
    module = saved(name, tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    expected = translate(weights_of(module), CASES[name][0], folder.spec)
    assert set(folder.paths) == expected.keys()
    for path in folder.paths:
        whole = folder(path)
        assert torch.equal(whole, expected[path]), path
        assert torch.equal(folder.rows(path, 0, 1), whole[:1])
    assert torch.equal(folder("head.projection.weight"), module.lm_head.weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_is_what_was_read(name: str, tmp_path: Path) -> None:
    module = saved(name, tmp_path / "first", max_shard_size="50KB")
    read = HuggingFaceFolder(tmp_path / "first")
    export_huggingface(tmp_path / "again", read.config, read, shard_bytes=50_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    expected, found = module.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path


def test_an_export_in_another_dtype_says_so(tmp_path: Path) -> None:
    saved("llama", tmp_path / "first")
    read = HuggingFaceFolder(tmp_path / "first")
    export_huggingface(tmp_path / "half", read.config, read, dtype=torch.bfloat16)
    assert sorted(file.name for file in (tmp_path / "half").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert HuggingFaceFolder(tmp_path / "half")("norm.weight").dtype == torch.bfloat16


def test_a_tensor_that_is_stored_as_it_is_is_a_view_of_the_file(tmp_path: Path) -> None:
    """Pages of what nobody looks at are never read."""
    saved("gpt2", tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    for path in ("embedding.tokens.weight", "blocks.1.attention.key.weight", "blocks.0.ffn.up.weight"):
        assert folder(path).data_ptr() == folder(path).data_ptr()


def test_a_model_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    module = saved("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    shorter = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    shorter["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the mask that older files hold
    save_file(shorter, file)
    assert torch.equal(HuggingFaceFolder(tmp_path)("embedding.tokens.weight"), module.transformer.wte.weight)


def test_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"

    def refusal(changed: dict[str, str]) -> str:
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(PlannerError) as caught:
            HuggingFaceFolder(tmp_path)
        return str(caught.value)

    assert "blocks.1.ffn.experts.gate of expert 3" in refusal({k: v for k, v in names.items() if k != name})
    assert "missing" in refusal({k: v for k, v in names.items() if k != "model.norm.weight"})
    assert "the index promises" in refusal(names | {"model.layers.9.input_layernorm.weight": names[name]})
    file = tmp_path / names[name]
    whole = file.read_bytes()
    save_file(load_file(file) | {"model.extra": torch.ones(2)}, file)
    assert "0 rules for model.extra" in refusal(names | {"model.extra": names[name]})
    file.write_bytes(whole[:-7])
    assert "a file of the checkpoint is whole" in refusal(names)
    file.unlink()
    assert file.name in refusal(names)
    index.unlink()
    with pytest.raises(PlannerError, match="read from safetensors"):
        HuggingFaceFolder(tmp_path)


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(PlannerError, match="has the shape") as caught:
        HuggingFaceFolder(tmp_path)("blocks.0.ffn.up.weight")
    assert "(80, 64), wanted (96, 64)" in str(caught.value)


def test_an_export_makes_a_whole_folder_or_none(tmp_path: Path) -> None:
    saved("llama", tmp_path / "first")
    read = HuggingFaceFolder(tmp_path / "first")
    with pytest.raises(PlannerError, match="folder of its own"):
        export_huggingface(tmp_path / "first", read.config, read)

    def failing(path: str) -> torch.Tensor:
        if path.startswith("blocks.1"):
            raise KeyError(path)
        return read(path)

    with pytest.raises(KeyError):
        export_huggingface(tmp_path / "again", read.config, failing, shard_bytes=50_000)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


def test_ranks_that_do_not_write_read_in_the_same_order(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "first")
    read = HuggingFaceFolder(tmp_path / "first")
    asked: list[list[str]] = [[], []]
    for number, order in enumerate(asked):

        def noted(path: str, order: list[str] = order) -> torch.Tensor:
            order.append(path)
            return read(path)

        export_huggingface(tmp_path / "again", read.config, noted, writes=number == 0)
    assert asked[0] == asked[1]
    assert sorted(asked[0]) == sorted(read.paths)


@pytest.mark.parametrize("kind", ["llama", "gpt", "mixtral"])
def test_a_bundled_model_without_a_configuration_is_exported_with_one(kind: str, tmp_path: Path) -> None:
    spec = tiny_spec(kind, ffn=32)  # as wide as the experts of the last
    ours = build_model(spec).eval()
    weights = weights_of(ours)
    export_huggingface(tmp_path / "out", config_from_spec(spec), lambda path: weights[path])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(2, 34).reshape(2, 16)
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=tokens).logits, ours(tokens), atol=1e-5)
