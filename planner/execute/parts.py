"""Where a rank's parts of a weight lie in the whole: without padding, each copy of a kv head at the one place.

What is written by these places can be read under any other layout. What a rank holds is what `cut` narrowed, dim
by dim, and of that the chunk which FSDP keeps: one box of the whole, and of a fused weight one of each fused part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from planner.execute.parameters import Piece, chunk_of_state, local, pieces_of

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # by path the one a weight is kept under, and its shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Values of this rank, and the box of the whole tensor that they fill."""

    tensor: Tensor  # shares memory with the weight
    offsets: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(self.tensor.shape)

    def copied(self) -> Part:
        """The same with values of their own on the CPU."""
        return replace(self, tensor=self.tensor.detach().to("cpu", copy=True))


@dataclass(frozen=True, slots=True)
class _Run:
    """Along one dim: values that follow one another here and in the whole, from `first` on there."""

    first: int
    length: int
    real: bool = True  # else padding, which has no place in the whole


def whole_shapes(model: nn.Module) -> Shapes:
    """For every path of an unsplit model the path it is kept under, one for a tied pair, and its shape."""
    first = {id(value): path for path, value in model.named_parameters()}
    shapes = {
        path: (first[id(value)], tuple(value.shape))
        for path, value in model.named_parameters(remove_duplicate=False)
    }
    buffers = model.state_dict().keys() - shapes.keys()
    return shapes | {path: (path, tuple(model.state_dict()[path].shape)) for path in buffers}


def parts_of(
    module: nn.Module, shapes: Shapes, values: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, tuple[Part, ...]]]:
    """For each weight of a stage its path, the path it is kept under, and parts of it with these values.

    Values are as a rank holds them: of a split and sharded weight its local tensor. A weight without any real
    value, on a rank that has padding alone, is left out.
    """
    for path, value in values.items():
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        kept, whole = shapes[path]
        runs = _runs(getattr(owner, name), whole, pieces_of(owner, name))
        held = tuple(sum(run.length for run in along) for along in runs)
        assert tuple(value.shape) == held, f"{path}: a rank holds {tuple(value.shape)}, not {held}"
        parts = tuple(_boxes(value.detach(), runs, whole))
        if parts:
            yield path, kept, parts


def _boxes(held: Tensor, runs: list[list[_Run]], whole: tuple[int, ...]) -> Iterator[Part]:
    """One for each choice of a run along every dim."""
    starts = [itertools.accumulate((run.length for run in along), initial=0) for along in runs]
    placed = [list(zip(begin, along, strict=False)) for begin, along in zip(starts, runs, strict=True)]
    for chosen in itertools.product(*placed):
        box = held
        for dim, (start, run) in enumerate(chosen):
            box = box.narrow(dim, start, run.length)
        if all(run.real for _, run in chosen) and box.numel():
            yield Part(tensor=box, offsets=tuple(run.first for _, run in chosen), whole=whole)


def _runs(parameter: Tensor, whole: tuple[int, ...], pieces: tuple[Piece, ...]) -> list[list[_Run]]:
    """What a rank holds of a weight along each dim, in the order in which it lies here."""
    runs = [[_Run(0, size)] for size in whole]
    for piece in pieces:
        along = runs[piece.dim]
        size = sum(run.length for run in along)
        if piece.padded > size:
            along.append(_Run(0, piece.padded - size, real=False))
        fused = piece.parts or (max(size, piece.padded),)
        firsts = itertools.accumulate(fused, initial=0)
        each = ((first, part // piece.count) for first, part in zip(firsts, fused, strict=False))
        runs[piece.dim] = [run for first, own in each for run in _narrowed(along, first + piece.number * own, own)]
    chunk = chunk_of_state(parameter)
    if chunk is not None:
        dim, ranks, number = chunk
        size = -(-sum(run.length for run in runs[dim]) // ranks)  # as torch.chunk cuts: the last may be short
        runs[dim] = list(_narrowed(runs[dim], number * size, size))
    return runs


def _narrowed(runs: list[_Run], first: int, length: int) -> Iterator[_Run]:
    """`length` values of these from `first` on, or as many as there are."""
    start = 0
    for run in runs:
        low, high = max(first, start), min(first + length, start + run.length)
        if low < high:
            yield replace(run, first=run.first + low - start, length=high - low)
        start += run.length


def held_values(module: nn.Module, *, buffers: bool = True) -> dict[str, Tensor]:
    """What a rank holds of every parameter and every lasting buffer, by path; a tied pair once."""
    values = {path: local(parameter.detach()) for path, parameter in module.named_parameters()}
    lasting = {path for path, _ in module.named_buffers()} & module.state_dict().keys() if buffers else ()
    return values | {path: local(module.get_buffer(path)) for path in sorted(lasting)}
