"""Where a rank's part of a weight lies in the whole: without padding, each copy of a kv head at the one place.

What is written by these places can be read under any other layout. A part is what `cut` narrowed, dim by dim,
and of that the chunk which FSDP keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from planner.execute.parameters import Piece, chunk_of_state, local, pieces_of


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
class _Span:
    """Along one dim: where a rank's values begin in the whole, how many it has, and how many are no padding."""

    first: int
    held: int  # with padding
    real: int

    def narrowed(self, first: int, length: int) -> _Span:
        """`length` values of these from `first` on."""
        return _Span(self.first + first, length, min(max(self.real - first, 0), length))


def whole_shapes(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For every path of an unsplit model the path it is kept under, one for a tied pair, and its shape."""
    first = {id(value): path for path, value in model.named_parameters()}
    shapes = {
        path: (first[id(value)], tuple(value.shape))
        for path, value in model.named_parameters(remove_duplicate=False)
    }
    buffers = model.state_dict().keys() - shapes.keys()
    return shapes | {path: (path, tuple(model.state_dict()[path].shape)) for path in buffers}


def parts_of(
    module: nn.Module, shapes: Mapping[str, tuple[str, tuple[int, ...]]], values: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Part]]:
    """For each weight of a stage its path, the path it is kept under, and a part of it with these values.

    Values are as a rank holds them: of a split and sharded weight its local tensor. Parts without any real
    value, of a rank that has padding alone, are left out.
    """
    for path, value in values.items():
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        parameter = getattr(owner, name)
        kept, whole = shapes[path]
        spans = _spans(parameter, whole, pieces_of(owner, name))
        held = tuple(span.held for span in spans)
        assert tuple(value.shape) == held, f"{path}: a rank holds {tuple(value.shape)}, not {held}"
        real = value.detach()
        for dim, span in enumerate(spans):
            real = real.narrow(dim, 0, span.real)
        if real.numel():
            yield path, kept, Part(tensor=real, offsets=tuple(span.first for span in spans), whole=whole)


def _spans(parameter: Tensor, whole: tuple[int, ...], pieces: tuple[Piece, ...]) -> list[_Span]:
    spans = [_Span(0, size, size) for size in whole]
    for piece in pieces:
        assert not piece.parts, "a piece of a fused weight is no box; the bundled decoders fuse none"
        span = spans[piece.dim]
        size = max(span.held, piece.padded) // piece.count
        spans[piece.dim] = span.narrowed(piece.number * size, size)
    chunk = chunk_of_state(parameter)
    if chunk is not None:
        dim, ranks, number = chunk
        held = spans[dim].held
        size = -(-held // ranks)  # as torch.chunk cuts, so that the last may be short or empty
        first = min(number * size, held)
        spans[dim] = spans[dim].narrowed(first, min(size, held - first))
    return spans


def held_values(module: nn.Module) -> dict[str, Tensor]:
    """What a rank holds of every parameter and every lasting buffer, by path; a tied pair once."""
    values = {path: local(parameter.detach()) for path, parameter in module.named_parameters()}
    lasting = {path for path, _ in module.named_buffers()} & module.state_dict().keys()
    return values | {path: local(module.get_buffer(path)) for path in sorted(lasting)}
