"""Where weights come from, and how each rank gets its pieces: never more of a weight than one tensor at a time.

A `Source` gives a whole tensor on the CPU for a path of the unsplit model. A stage is split and sharded on the
meta device, then filled from a source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.execute.parameters import chunk_of_state, local, pieces_of
from planner.execute.stage import Stage
from planner.models.build import drawn

Source = Callable[[str], Tensor]
Fill = Callable[[nn.Module], None]  # gives weights and buffers that have memory their values


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
    for path, _ in _tensors_of(module):
        _put(module, path, source(path))


def fill_from_first(module: nn.Module, model: nn.Module) -> None:
    """The same with the values that the whole model has on rank 0: one tensor at a time goes to all ranks.

    On the others `model` is on the meta device. All ranks call this.
    """
    first = {id(value): path for path, value in _tensors_of(model)}  # one for a tied pair
    wanted: dict[str, list[str]] = {}
    for path, _ in _tensors_of(module):
        owner, name = owner_of(model, path)
        wanted.setdefault(first[id(getattr(owner, name))], []).append(path)
    for path, value in _tensors_of(model):
        sent = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        if not value.is_meta:
            sent.copy_(value.detach())
        dist.broadcast(sent.view(-1).view(torch.uint8), 0)  # of whatever dtype
        for place in wanted.get(path, ()):
            _put(module, place, sent)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _put(module: nn.Module, path: str, whole: Tensor) -> None:
    """What a rank keeps of a tensor, in its place."""
    owner, name = owner_of(module, path)
    held = getattr(owner, name).detach()
    with torch.no_grad():
        for piece in pieces_of(owner, name):
            whole = piece.of(whole)
        local(held).copy_(own_shard(held, whole))


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
