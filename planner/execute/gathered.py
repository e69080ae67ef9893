"""Whole weights on rank 0, gathered from all ranks one at a time."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.execute.checkpoint_items import Parts
from planner.execute.parts import Part

_Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def gatherer(parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """Reads whole weights by path. All ranks ask for the same, in the same order; only rank 0 gets values.

    Of parts that several ranks hold the lowest sends them. The others get a tensor on the meta device.
    """
    boxes: list[dict[str, _Boxes]] = [{} for _ in range(dist.get_world_size())]
    own = {path: [(part.offsets, part.sizes) for part in held] for path, held in parts.items()}
    dist.all_gather_object(boxes, own)
    rank = dist.get_rank()

    def read(path: str) -> Tensor:
        mine = path in own and not any(held.get(path) == own[path] for held in boxes[:rank])
        sent = [part.copied() for part in parts[path]] if mine else []
        found: list[Any] | None = [None] * len(boxes) if rank == 0 else None
        dist.gather_object(sent, found)
        if found is None:
            return torch.empty(shapes[path], device="meta")
        return _assembled(path, [part for held in found for part in held])

    return read


def _assembled(path: str, parts: list[Part]) -> Tensor:
    whole = parts[0].tensor.new_empty(parts[0].whole)
    for part in parts:
        place = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))
        whole[place] = part.tensor
    filled = sum(part.tensor.numel() for part in parts)
    assert filled == whole.numel(), f"{path}: {filled} of {whole.numel()} values"
    return whole
