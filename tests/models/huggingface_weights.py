"""Weights of a Hugging Face module → the bundled module of the same architecture, parameter by parameter."""

from __future__ import annotations

import torch
from torch import nn

from planner.models.huggingface import translate, weights_of
from planner.spec.model import ModelSpec


def copy_weights(hf_module: nn.Module, our_module: nn.Module, model_type: str) -> None:
    """Give our module the weights of the other; all of ours must be set, in their shapes."""
    spec = our_module.spec
    assert isinstance(spec, ModelSpec)
    given, wanted = translate(weights_of(hf_module), model_type, spec), weights_of(our_module)
    if given.keys() != wanted.keys():
        raise ValueError(f"never set, or not ours: {sorted(given.keys() ^ wanted.keys())}")
    for name, weight in wanted.items():
        if weight.shape != given[name].shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, given {tuple(given[name].shape)}")
        with torch.no_grad():
            weight.copy_(given[name])
