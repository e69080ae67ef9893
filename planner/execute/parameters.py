"""Weights as pieces: cut over a group, used as plain tensors, summed where ranks hold parts of a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from planner.errors import PlannerError
from planner.execute.mesh import Peers

_PIECES = "_planner_pieces"  # in a module's dict: it outlives sharding, which replaces parameters


@dataclass(frozen=True, slots=True)
class Summed:
    """A weight whose gradient is a part on each of these ranks: `synchronise` adds the parts once a step."""

    module: nn.Module
    name: str
    peers: Peers

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: sharding replaces it."""
        found = getattr(self.module, self.name)
        assert isinstance(found, nn.Parameter)
        return found


@dataclass(frozen=True, slots=True)
class Piece:
    """Which part of a weight a rank keeps along one dim, filled up with zeros to `padded` where that is more.

    Of a fused weight, which `parts` make up along the dim, it keeps its part of each.
    """

    dim: int
    count: int
    number: int
    padded: int = 0
    parts: tuple[int, ...] = ()

    def of(self, whole: Tensor) -> Tensor:
        """The part as a view, of a filled copy where there is padding."""
        margin = self.padded - whole.shape[self.dim]
        if margin > 0:
            whole = F.pad(whole, [0, 0] * (whole.dim() - 1 - self.dim) + [0, margin])
        fused = torch.split(whole, list(self.parts or whole.shape[self.dim :][:1]), self.dim)
        own = [self._own(part) for part in fused]
        return own[0] if len(own) == 1 else torch.cat(own, self.dim)

    def _own(self, part: Tensor) -> Tensor:
        size = part.shape[self.dim] // self.count
        return part.narrow(self.dim, self.number * size, size)


def pieces_of(module: nn.Module, name: str) -> tuple[Piece, ...]:
    """How `cut` narrowed a weight, in the order of the cuts; empty where it is whole."""
    found: tuple[Piece, ...] = module.__dict__.get(_PIECES, {}).get(name, ())
    return found


def keep_whole(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Equal on all ranks of the mesh, and known to be."""
    parameter = _parameter(module, name)
    whole = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
    module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def cut(module: nn.Module, name: str, mesh: DeviceMesh, *pieces: Piece) -> None:
    """Keep this rank's piece along each dim, the ranks of one mesh dim for each."""
    parameter = _parameter(module, name)
    part = parameter.detach()
    for piece in pieces:
        length = max(part.shape[piece.dim], piece.padded)
        if any(size % piece.count for size in piece.parts or (length,)):
            raise PlannerError(
                f"{piece.count} pieces of equal size make up dim {piece.dim} of a weight",
                value=f"{name} {tuple(parameter.shape)} of {type(module).__name__}",
                remedy="use a degree that divides it, or replicate the module",
                key="modules",
            )
        part = piece.of(part)
    own = part.clone(memory_format=torch.contiguous_format)
    spread = DTensor.from_local(own, mesh, [Shard(piece.dim) for piece in pieces], run_check=False)
    module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    module.__dict__.setdefault(_PIECES, {})[name] = pieces


def chunk_of_state(parameter: Tensor) -> tuple[int, int, int] | None:
    """Dim, ranks and own number, where FSDP spreads a weight over data-parallel ranks."""
    if not isinstance(parameter, DTensor):
        return None
    names = parameter.device_mesh.mesh_dim_names or ()
    if "dp" not in names:
        return None
    axis = names.index("dp")
    placement = parameter.placements[axis]
    dim = getattr(placement, "dim", None)  # of Shard, and of the strided kind that FSDP makes of a cut weight
    if dim is None or parameter.device_mesh.size(axis) == 1:
        return None
    return dim, parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis)


def local(parameter: Tensor | None) -> Tensor:
    """This rank's part of a weight as a plain tensor through which gradients flow."""
    assert parameter is not None
    if not isinstance(parameter, DTensor):
        return parameter
    if torch.compiler.is_compiling() or not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter.to_local()
    part: Tensor = _Part.apply(parameter)  # type: ignore[no-untyped-call]
    return part


def like(weight: Tensor, part: Tensor) -> Tensor:
    """A part as a weight is: with its layout over ranks."""
    if not isinstance(weight, DTensor):
        return part
    return _wrapped(part, weight._spec)


def _wrapped(part: Tensor, spec: Any) -> DTensor:
    """With a layout of its own: some of torch's functions change it."""
    return DTensor(part, copy.copy(spec), requires_grad=False)  # type: ignore[no-untyped-call]


class _Part(torch.autograd.Function):
    """What `to_local` does, but that the gradient is wrapped as the weight is and not worked out anew.

    That takes the host a tenth of a millisecond, as long as some layers take a GPU.
    """

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.spec, part = weight._spec, weight._local_tensor
        ctx.stride = part.stride()
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> DTensor | None:
        part = gradients[0]
        if part is None:
            return None
        if part.stride() != ctx.stride:
            part = part.contiguous()
        return _wrapped(part, ctx.spec)


@contextmanager
def local_parameters(module: nn.Module) -> Iterator[None]:
    """A module whose own weights are this rank's parts, as plain tensors, for as long as this lasts."""
    kept = dict(module._parameters)
    parts: dict[str, Any] = {name: value if value is None else local(value) for name, value in kept.items()}
    module._parameters.update(parts)
    try:
        yield
    finally:
        module._parameters.update(kept)


def replace_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let a module's forward be a wrapped one. Hooks stay outside, its path and its class stay the same."""
    module.forward = wrap(module.forward)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a module or class for as long as this lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = module._parameters[name]
    assert found is not None
    return found
