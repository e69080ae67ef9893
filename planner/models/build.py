"""A spec becomes a module; a module gets weights that depend on nothing but their path and a seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from planner.models.decoder import Decoder
from planner.models.encoder import Encoder, EncoderDecoder
from planner.models.vision import VisionTransformer
from planner.spec.model import ModelSpec

_KINDS: dict[str, type[nn.Module]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "vision": VisionTransformer,
}


def build_model(
    spec: ModelSpec, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The module of a spec. On the meta device it costs no memory; elsewhere call `initialise` next."""
    with torch.device("meta"):
        module = _KINDS[spec.kind](spec).to(dtype)
    if torch.device(device).type == "meta":
        return module
    module.to_empty(device=device)
    if isinstance(module, (Decoder, Encoder, EncoderDecoder)):
        module.tie_weights()  # to_empty gave each of a tied pair memory of its own
    return initialise(module)


def initialise(module: nn.Module, seed: int = 0, deviation: float = 0.02) -> nn.Module:
    """Normal weights, zero biases, norms at one; each tensor's values follow from its path and the seed alone."""
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            owner = module.get_submodule(path.rpartition(".")[0])
            parameter.copy_(drawn(path, owner, parameter.shape, seed, deviation))
        for buffer in module.buffers():
            buffer.zero_()
    return module


def drawn(path: str, owner: nn.Module, shape: torch.Size, seed: int = 0, deviation: float = 0.02) -> Tensor:
    """The values of one parameter of `owner`: on the CPU in fp32, so that no device or precision changes them."""
    leaf = path.rpartition(".")[2]
    if leaf.endswith("bias") or leaf == "sinks":
        return torch.zeros(shape)
    if "Norm" in type(owner).__name__:
        return torch.full(shape, 0.0 if getattr(owner, "unit_offset", False) else 1.0)
    generator = generator_for(f"{seed}/{path}")
    return torch.empty(shape, device="cpu").normal_(0.0, deviation, generator=generator)


def generator_for(text: str) -> torch.Generator:
    """Random numbers that follow from a text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
