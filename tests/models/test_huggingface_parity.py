"""Each bundled architecture against its Hugging Face implementation: same weights, same logits, in fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.execute.huggingface_build import in_double
from planner.models import build_model
from planner.models.huggingface import translate, weights_of
from planner.spec.huggingface import spec_data_from_config
from planner.spec.model import ModelSpec
from tests.models.huggingface_cases import BATCH, CASES, LENGTH, VOCAB
from tests.models.huggingface_weights import copy_weights

transformers = pytest.importorskip("transformers", minversion="5.0")

TOLERANCE = 1e-9


def twins(model_type: str, config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Their module with random weights, norms and biases included, and ours with the same."""
    auto = {
        "bert": transformers.AutoModelForMaskedLM,
        "t5": transformers.AutoModelForSeq2SeqLM,
        "vit": transformers.AutoModelForImageClassification,
    }.get(model_type, transformers.AutoModelForCausalLM)
    with in_double():
        built = transformers.AutoConfig.for_model(model_type, **config)
        theirs = auto.from_config(built, attn_implementation="eager", experts_implementation="eager").eval()
    if model_type == "bloom":
        for block in theirs.transformer.h:
            block.mlp.gelu_impl = nn.GELU("tanh")  # its own rounds √(2/π) to eight digits
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights_of(theirs).items():
        center = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
        with torch.no_grad():
            weight.copy_(center + 0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    spec = ModelSpec.from_dict(spec_data_from_config({"model_type": model_type} | config))
    ours = build_model(spec, dtype=torch.float64).eval()
    copy_weights(theirs, ours, model_type)
    return theirs, ours


def inputs(model_type: str) -> list[Tensor]:
    """Tokens, or tokens and targets, or images."""
    generator = torch.Generator().manual_seed(1)
    if model_type == "vit":
        return [torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)]
    lengths = (LENGTH, LENGTH - 5) if model_type == "t5" else (LENGTH,)
    # not tokens 0 and 1, which some of theirs take for padding: their embedding gets no gradient
    return [torch.randint(2, VOCAB, (BATCH, length), generator=generator) for length in lengths]


def their_logits(module: nn.Module, model_type: str, given: list[Tensor]) -> Tensor:
    """What the Hugging Face module answers."""
    if model_type == "vit":
        return module(pixel_values=given[0]).logits
    names = ("input_ids", "decoder_input_ids")[: len(given)]
    return module(**dict(zip(names, given, strict=True))).logits


@pytest.mark.parametrize("name", CASES)
def test_the_logits_agree(name: str) -> None:
    model_type, config = CASES[name]
    theirs, ours = twins(model_type, config)
    given = inputs(model_type)
    with torch.no_grad(), in_double():
        expected = their_logits(theirs, model_type, given)
    with torch.no_grad():
        actual = ours(*given)
    assert expected.dtype == actual.dtype == torch.float64
    assert expected.std() > 0.1
    assert (actual - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_agree(name: str) -> None:
    model_type, config = CASES[name]
    theirs, ours = twins(model_type, config)
    given = inputs(model_type)
    with in_double():
        logits = their_logits(theirs, model_type, given)
        into = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (logits * into).sum().backward()
    (ours(*given) * into).sum().backward()
    gradients = {path: weight.grad for path, weight in theirs.named_parameters()}
    expected = translate(gradients, model_type, ours.spec)
    # softmax ignores the bias of the keys: its gradient is rounding noise, which has no relative error
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for path, weight in ours.named_parameters():
        error = (weight.grad - expected[path]).abs().max() / (expected[path].abs().max() + floor)
        assert error.item() < TOLERANCE, path


def test_a_weight_without_a_place_or_a_place_without_a_weight_is_an_error() -> None:
    theirs, ours = twins(*CASES["falcon_7b"])
    weights = weights_of(theirs)
    norm = weights["transformer.h.0.input_layernorm.weight"]
    with pytest.raises(ValueError, match="0 rules for extra"):
        translate(weights | {"extra": norm}, "falcon", ours.spec)
    with pytest.raises(ValueError, match="set twice"):
        translate(weights | {"transformer.h.0.ln_attn.weight": norm}, "falcon", ours.spec)
    deeper = build_model(dataclasses.replace(ours.spec, layers=3))
    with pytest.raises(ValueError, match=r"never set.*blocks\.2"):
        copy_weights(theirs, deeper, "falcon")
