"""Where weights come from, and how each rank gets its pieces: never more of a weight than one tensor at a time.

A `Source` gives a whole tensor on the CPU for a path of the unsplit model. A stage is split and sharded on the
meta device, then filled from a source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planner.execute.parameters import chunk_of_state, local, pieces_of
from planner.execute.stage import Stage
from planner.models.build import drawn

Source = Callable[[str], Tensor]


def drawn_for(model: nn.Module, seed: int) -> Source:
    """Values that follow from path and seed alone, as `initialise` draws them; `model` may be on meta."""
    paths = {id(parameter): path for path, parameter in model.named_parameters()}  # one for a tied pair

    def read(path: str) -> Tensor:
        owner, name = owner_of(model, path)
        if name in owner._buffers:
            return torch.zeros_like(getattr(owner, name), device="cpu")
        parameter = getattr(owner, name)
        first = paths[id(parameter)]
        return drawn(first, owner_of(model, first)[0], parameter.shape, seed)

    return read


def copied_from(model: nn.Module) -> Source:
    """The values that a whole module has."""

    def read(path: str) -> Tensor:
        owner, name = owner_of(model, path)
        value: Tensor = getattr(owner, name).detach()
        return value

    return read


def fill(stage: Stage, source: Source, device: torch.device) -> None:
    """Give a stage on meta memory, and its weights their values."""
    stage.to_empty(device=device)
    stage.tie_weights()
    fill_parameters(stage, source)


def fill_parameters(module: nn.Module, source: Source) -> None:
    """Give weights and buffers that have memory their values."""
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            owner, name = owner_of(module, path)
            part = source(path)
            for piece in pieces_of(owner, name):
                part = piece.of(part)
            local(parameter.detach()).copy_(own_shard(parameter, part))
        for path, buffer in module.named_buffers():
            buffer.copy_(source(path))


def without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device, with weights shared as in the model."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter or buffer belongs to, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def own_shard(parameter: Tensor, part: Tensor) -> Tensor:
    """What FSDP keeps of a piece on this rank: chunks as torch cuts them, of which the last may be empty."""
    chunk = chunk_of_state(parameter)
    if chunk is None:
        return part
    dim, ranks, number = chunk
    chunks = part.chunk(ranks, dim)
    return chunks[number] if number < len(chunks) else part.narrow(dim, 0, 0)
