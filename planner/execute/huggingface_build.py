"""A module of Hugging Face's library built from a configuration, as a script of a user's own would load it."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner.errors import PlannerError
from planner.execute.huggingface_stage import spec_of_huggingface


def build_huggingface(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, device: str = "meta"
) -> nn.Module:
    """For causal language modelling. What the executor does not run is refused."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise PlannerError(
            "modules of Hugging Face are built by transformers, which is not installed",
            value=config.get("model_type"),
            remedy='pip install "transformers>=5.0", or leave transformers out',
            key="transformers",
        ) from None
    given = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    given |= dict.fromkeys(("bos_token_id", "eos_token_id"))  # nothing is generated
    built = AutoConfig.for_model(config["model_type"], **given)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            built, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    spec_of_huggingface(model)
    return model


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, what asks for 32-bit gets 64: the library widens to fp32 in norms, softmax and tables.

    What is imported inside would keep tables of dtypes that are wrong ever after.
    """
    for name in ("safetensors.torch", "transformers.modeling_utils"):
        importlib.import_module(name)
    single, default = torch.float32, torch.get_default_dtype()
    to_single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = to_single  # type: ignore[method-assign]
        torch.set_default_dtype(default)
