"""Rules for functions that only say in which order elements lie: views, permutations, slices.

A view may join the cut dim with what lies behind it, or take it apart, as long as each rank's part of the result
is the result of its part. What takes a fused result apart, as queries, keys and values that one layer gives, must
do so where the layer's weight is cut: `Source` notes where that is, before any weight is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from planner.execute.cut import Along, Call, Cut, Rule, moved_to


def _shape(call: Call) -> Any:
    cut = call.first()
    if call.name in ("dim", "get ndim"):
        return cut.local.dim()
    if call.name in ("numel", "nelement"):
        return math.prod(cut.whole_shape)
    if call.name == "len":
        return cut.whole_shape[0]
    shape = torch.Size(cut.whole_shape)
    dim = call.value(1, "dim")
    return shape if dim is None else shape[dim]


def _view(call: Call) -> Any:
    cut = call.first()
    given: Any = call.args[1:] or (call.kwargs.get("shape", call.kwargs.get("size")),)
    if len(given) == 1 and isinstance(given[0], torch.dtype):
        raise call.refused("of another dtype")
    return _as_shape(call, cut, _listed(given))


def _listed(given: Sequence[Any]) -> list[int]:
    """Sizes or dims that a function takes one by one, or together."""
    return list(given[0]) if isinstance(given[0], (tuple, list)) else list(given)


def _view_as(call: Call) -> Any:
    other = call.args[1]
    return _as_shape(call, call.first(), list(other.whole_shape if isinstance(other, Cut) else other.shape))


def _flatten(call: Call) -> Any:
    cut = call.first()
    ndim = cut.local.dim()
    start, end = call.value(1, "start_dim", 0) % ndim, call.value(2, "end_dim", -1) % ndim
    sizes = list(cut.whole_shape)
    return _as_shape(call, cut, [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]])


def _unflatten(call: Call) -> Any:
    cut = call.first()
    dim, sizes = call.value(1, "dim") % cut.local.dim(), list(call.value(2, "sizes"))
    whole = list(cut.whole_shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = whole[dim] // -math.prod(sizes)
    return _as_shape(call, cut, [*whole[:dim], *sizes, *whole[dim + 1 :]])


def _as_shape(call: Call, cut: Cut, wanted: list[int]) -> Cut:
    """The same elements in order, in another whole shape."""
    whole = cut.whole_shape
    if -1 in wanted:
        wanted[wanted.index(-1)] = math.prod(whole) // max(1, -math.prod(wanted))
    along = cut.along
    if math.prod(wanted) != math.prod(whole):
        raise call.refused(f"{list(whole)} as {wanted}")
    dim = _starting_at(math.prod(whole[: along.dim]), wanted)
    if dim is None:
        raise call.refused(f"{list(whole)}, cut along dim {along.dim}, as {wanted}")
    one_head = dim > 0 and wanted[dim - 1] == 1 and wanted[dim] == along.size
    if one_head and along.ranks == 1:  # which every rank has
        return Cut.of(cut.local.reshape(wanted), replace(along, dim=dim - 1, size=1))
    if one_head and along.source is not None:
        along.source.few.add(1)
    found, local = _fitted(call, along, dim, wanted), cut.local
    if along.copies > 1 and found.size > along.size:
        local, found = _shared_out(local, along.dim + 1, along, found)
    own = list(wanted)
    own[found.dim] //= found.ranks
    return Cut.of(local.reshape(own), found)


def _shared_out(local: Tensor, behind: int, along: Along, joined: Along) -> tuple[Tensor, Along]:
    """Copies of one head, joined with what lies behind it: each rank goes on with its share of that."""
    size = local.shape[behind]
    if along.size != along.ranks or size % along.copies or joined.size // along.size % size:
        return local, joined
    share = size // along.copies
    own = local.narrow(behind, along.peers.rank % along.copies * share, share)
    return own, replace(joined, copies=1)


def _starting_at(before: int, sizes: Sequence[int]) -> int | None:
    """The dim in front of which so many elements vary more slowly."""
    product = 1
    for dim, size in enumerate(sizes):
        if product == before and size != 1:
            return dim
        product *= size
    return None


def _fitted(call: Call, along: Along, dim: int, wanted: Sequence[int]) -> Along:
    size, ranks = wanted[dim], along.ranks
    if size % along.size == 0:  # the same, or joined with what lies behind it
        times = size // along.size
        parts = tuple(part * times for part in along.parts)
        return replace(
            along, dim=dim, size=size, parts=parts, unit=along.unit, source=along.source if times == 1 else None
        )
    if along.size % size:
        raise call.refused(f"{along.size} that are cut taken apart by {size}")
    inner = along.size // size
    parts = along.parts or (along.size,)
    fused = along.source is not None and inner * along.unit in along.source.fused
    if not fused and all(part % (inner * ranks) == 0 for part in parts):
        fewer = tuple(part // inner for part in along.parts)
        return replace(along, dim=dim, size=size, parts=fewer, unit=along.unit * inner)
    behind = dim + 1
    if along.source is not None and size < ranks and ranks % size == 0:
        along.source.few.add(size)
    if along.source is not None and not along.parts and behind < len(wanted) and wanted[behind] % ranks == 0:
        along.source.boundaries |= {number * inner * along.unit for number in range(size)}
        return Along(behind, wanted[behind], along.peers, copies=along.copies)
    if along.parts == (inner,) * size and behind < len(wanted) and wanted[behind] % ranks == 0:
        return Along(behind, wanted[behind], along.peers, copies=along.copies)
    if fused and behind < len(wanted):
        along.require_divisible(wanted[behind], f"heads of each of the {size} that one layer gives")
    along.require_divisible(size, "heads")
    raise call.refused(f"{along.size} fused features taken apart by {size}")


def _permuted(order: Callable[[Call, int], Sequence[int]]) -> Rule:
    def rule(call: Call) -> Any:
        cut = call.first()
        dims = [dim % cut.local.dim() for dim in order(call, cut.local.dim())]
        return Cut.of(cut.local.permute(dims), moved_to(cut.along, dims.index(cut.along.dim)))

    return rule


def _swapped(call: Call, ndim: int) -> Sequence[int]:
    first, second = (
        call.value(1, "dim0", call.kwargs.get("axis0")),
        call.value(2, "dim1", call.kwargs.get("axis1")),
    )
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def _given_order(call: Call, ndim: int) -> Sequence[int]:
    given: Any = call.args[1:] or (call.kwargs["dims"],)
    return _listed(given)


def _moved(call: Call, ndim: int) -> Sequence[int]:
    source, target = call.value(1, "source"), call.value(2, "destination")
    if not isinstance(source, int):
        raise call.refused("several dims")
    order = [dim for dim in range(ndim) if dim != source % ndim]
    order.insert(target % ndim, source % ndim)
    return order


def _last_two(_: Call, ndim: int) -> Sequence[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]


def _unsqueeze(call: Call) -> Any:
    cut = call.first()
    dim = call.value(1, "dim") % (cut.local.dim() + 1)
    return Cut.of(cut.local.unsqueeze(dim), moved_to(cut.along, cut.along.dim + (dim <= cut.along.dim)))


def _squeeze(call: Call) -> Any:
    cut, dims = call.first(), call.dims(1)
    if dims is None:
        raise call.refused("without a dim")
    gone = [dim for dim in dims if cut.whole_shape[dim] == 1]
    if cut.along.dim in gone:
        raise call.refused("of the one head, which all ranks have")
    out = cut.local.squeeze(tuple(gone)) if gone else cut.local
    return Cut.of(out, moved_to(cut.along, cut.along.dim - sum(dim < cut.along.dim for dim in gone)))


def _expand(call: Call) -> Any:
    cut = call.first()
    given: Any = call.args[1:] or (call.kwargs["size"],)
    sizes = _listed(given)
    along, dim = cut.along, cut.along.dim + len(sizes) - cut.local.dim()
    if along.size == 1 < sizes[dim] and sizes[dim] % along.copies == 0:  # each rank has its share
        sizes[dim] //= along.copies
        return Cut.of(cut.local.expand(sizes), replace(along, dim=dim, size=sizes[dim] * along.copies, copies=1))
    if sizes[dim] not in (-1, cut.along.size):
        raise call.refused("the dim that is cut grows")
    sizes[dim] = -1
    return Cut.of(cut.local.expand(sizes), moved_to(cut.along, dim))


def _split(call: Call) -> Any:
    cut = call.first()
    sizes, dim = call.value(1, "split_size_or_sections", call.kwargs.get("split_size")), _dim(call, cut, 2)
    whole = cut.whole_shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    return _taken_apart(call, cut, dim, sizes)


def _chunk(call: Call) -> Any:
    cut, count = call.first(), call.value(1, "chunks")
    dim = _dim(call, cut, 2)
    whole = cut.whole_shape[dim]
    each = -(-whole // count)
    return _taken_apart(call, cut, dim, [min(each, whole - start) for start in range(0, whole, each)])


def _dim(call: Call, cut: Cut, place: int) -> int:
    dim: int = call.value(place, "dim", 0)
    return dim % cut.local.dim()


def _taken_apart(call: Call, cut: Cut, dim: int, sizes: Sequence[int]) -> tuple[Cut, ...]:
    found, start = [], 0
    for size in sizes:
        found.append(_stretch(call, cut, dim, start, start + size))
        start += size
    return tuple(found)


def _stretch(call: Call, cut: Cut, dim: int, start: int, end: int) -> Cut:
    """A slice of a dim; of the one that is cut, whole fused parts."""
    along = cut.along
    if dim != along.dim:
        return Cut.of(cut.local.narrow(dim, start, end - start), along)
    if (start, end) == (0, along.size):
        return cut
    if along.source is not None and not along.parts:
        along.source.boundaries |= {start * along.unit, end * along.unit}
        along.require_divisible(end - start, "features or heads of a fused layer")
        part = replace(along, size=end - start, source=None)
        return Cut.of(cut.local.narrow(dim, 0, part.size // along.ranks), part)
    known = along.boundaries()
    if not {start, end} <= set(known):
        raise call.refused(f"{start} to {end} of {along.size} that are cut in parts of {list(along.parts)}")
    parts = tuple(b - a for a, b in itertools.pairwise(known) if start <= a and b <= end)
    ranks = along.ranks
    own = cut.local.narrow(dim, start // ranks, (end - start) // ranks)
    return Cut.of(own, replace(along, size=end - start, parts=parts if len(parts) > 1 else ()))


def _narrow(call: Call) -> Any:
    cut = call.first()
    dim, start, length = call.value(1, "dim"), call.value(2, "start"), call.value(3, "length")
    return _stretch(call, cut, dim % cut.local.dim(), start, start + length)


def _unbind(call: Call) -> Any:
    cut = call.first()
    dim = _dim(call, cut, 1)
    if dim == cut.along.dim:
        return _seen_fused(call, cut).unbind(dim)
    along = moved_to(cut.along, cut.along.dim - (dim < cut.along.dim))
    return tuple(Cut.of(each, along) for each in cut.local.unbind(dim))


def _seen_fused(call: Call, cut: Cut) -> Tensor:
    """Where it is not yet known what a layer fuses, what is taken apart one by one is no dim of heads.

    That is noted, and this run goes on with a whole tensor: the next one cuts what lies behind.
    """
    along = cut.along
    if along.source is None or along.parts:
        raise call.refused("along the dim that is cut")
    along.source.fused.add(along.unit)
    return torch.cat([cut.local] * along.ranks, along.dim)


def _iterated(call: Call) -> Any:
    return iter(_unbind(Call("iter", call.func, (call.first(), 0), {})))


def _select(call: Call) -> Any:
    cut = call.first()
    dim, index = call.value(1, "dim") % cut.local.dim(), call.value(2, "index")
    return _seen_fused(call, cut).select(dim, index) if dim == cut.along.dim else _indexed_at(cut, dim, index)


def _indexed_at(cut: Cut, dim: int, index: int) -> Cut:
    return Cut.of(cut.local.select(dim, index), moved_to(cut.along, cut.along.dim - (dim < cut.along.dim)))


def _getitem(call: Call) -> Any:
    """x[...] with numbers, slices, None and ... ."""
    cut, index = call.first(), call.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (Tensor, list, bool)) for item in items):
        raise call.refused("by a tensor or a flag")
    named = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * (cut.local.dim() - named)
    found, dim = cut, 0
    for item in items:
        if item is None:
            place = found.along.dim + (dim <= found.along.dim)
            found = Cut.of(found.local.unsqueeze(dim), moved_to(found.along, place))
            dim += 1
        elif isinstance(item, slice):
            found = _sliced(call, found, dim, item)
            dim += 1
        elif dim == found.along.dim:
            return _seen_fused(call, cut)[index]
        else:
            found = _indexed_at(found, dim, item)
    return found


def _sliced(call: Call, cut: Cut, dim: int, item: slice) -> Cut:
    start, end, step = item.indices(cut.whole_shape[dim])
    if step == 1:
        return cut if (start, end) == (0, cut.whole_shape[dim]) else _stretch(call, cut, dim, start, end)
    if dim == cut.along.dim:
        raise call.refused("every so many along the dim that is cut")
    index = [slice(None)] * dim + [item]
    return Cut.of(cut.local[tuple(index)], cut.along)


SHAPES: dict[str, Rule] = {
    "size": _shape, "get shape": _shape, "dim": _shape, "get ndim": _shape, "numel": _shape, "nelement": _shape,
    "len": _shape, "view": _view, "reshape": _view, "view_as": _view_as, "reshape_as": _view_as,
    "flatten": _flatten, "unflatten": _unflatten, "transpose": _permuted(_swapped),
    "swapaxes": _permuted(_swapped), "swapdims": _permuted(_swapped), "permute": _permuted(_given_order),
    "movedim": _permuted(_moved),
    "get mT": _permuted(_last_two), "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand,
    "split": _split, "chunk": _chunk, "narrow": _narrow, "unbind": _unbind, "select": _select,
    "getitem": _getitem, "iter": _iterated,
}  # fmt: skip
