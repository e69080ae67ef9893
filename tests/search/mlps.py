"""Modules of linear layers that a user may write: a long chain, and branches that read the same values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[int, int], dict[str, Any]]]

_WIDTHS = (64, 256, 96, 512, 128, 384, 64, 1024, 64, 320, 192, 256, 64, 128, 64)


class Chain(nn.Module):
    """Fourteen layers of unequal widths."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(_WIDTHS):
            layers += [nn.Linear(into, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Branches(nn.Module):
    """Three feed-forwards of one input, one of them gated, then a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(128, width) for width in (256, 512, 1024))
        self.down = nn.ModuleList(nn.Linear(width, 128) for width in (256, 512, 1024))
        self.gate = nn.Linear(128, 512)
        self.last = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))

    def forward(self, x: Tensor) -> Any:
        first = self.down[0](torch.relu(self.up[0](x)))
        gated = self.down[1](self.up[1](x) * torch.sigmoid(self.gate(x)))
        third = self.down[2](torch.relu(self.up[2](x)))
        return x + self.last(first + gated + third)


def chain() -> Made:
    return Chain(), lambda batch, length: {"x": torch.zeros(batch, length, _WIDTHS[0])}


def branches() -> Made:
    return Branches(), lambda batch, length: {"x": torch.zeros(batch, length, 128)}
