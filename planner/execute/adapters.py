"""How a stage is cut out of a model: one builder for each kind of model that the executor runs."""

from __future__ import annotations

import torch
from torch import nn

from planner.errors import PlannerError
from planner.execute.huggingface_stage import (
    HuggingFaceStage,
    is_huggingface,
    spec_of_huggingface,
    type_of_huggingface,
)
from planner.execute.stage import DecoderStage, Stage
from planner.execute.weights import Source, drawn_for
from planner.models.build import build_model
from planner.models.decoder import Decoder
from planner.models.huggingface import joined
from planner.spec.model import ModelSpec
from planner.spec.paths import Span


def require_decoder(spec: ModelSpec, model: str) -> None:
    """Refuse to run, or to dry-run, a plan for another kind of model: its loss would be that of next tokens."""
    if spec.kind != "decoder":
        raise PlannerError(
            "the executor runs decoders, and a dry run is of what it runs",
            value=f"{model} of kind {spec.kind}",
            remedy="explain, estimate and compare take this plan; to run one, plan a model of kind: decoder",
            key="model",
        )


def stage_of(model: nn.Module, layers: Span, *, first: bool, last: bool, dtype: torch.dtype) -> Stage:
    """The stage of some layers of a model, on the meta device; the model itself is left as it is."""
    if is_huggingface(model):
        return HuggingFaceStage(model, layers, first=first, last=last).to(dtype)
    with torch.device("meta"):
        return DecoderStage(spec_of(model), layers, first=first, last=last).to(dtype)


def is_known(model: nn.Module) -> bool:
    """Whether its forward is known, so that stages can be cut from it."""
    return isinstance(model, Decoder) or is_huggingface(model)


def drawn_source(model: nn.Module, seed: int) -> Source:
    """Values for a model on the meta device: for one of Hugging Face those of the bundled model like it."""
    if not is_huggingface(model):
        return drawn_for(model, seed)
    spec = spec_of_huggingface(model)
    return joined(drawn_for(build_model(spec, device="meta"), seed), type_of_huggingface(model), spec)


def spec_of(model: nn.Module) -> ModelSpec:
    """What the model is built from."""
    if isinstance(model, Decoder):
        return model.spec
    if is_huggingface(model):
        return spec_of_huggingface(model)
    raise PlannerError(
        "the executor runs the decoders that a model specification builds, and those of Hugging Face",
        value=type(model).__name__,
        remedy="build the model with planner.models.build.build_model",
        key="model",
    )
