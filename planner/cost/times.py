"""Seconds by part of a step, as arrays: what a block takes in each pass over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.cost.layouts import Floats, Words
from planner.spec.estimate import StepTime
from planner.spec.strategy import Recompute

PARTS = tuple(item.name.removesuffix("_seconds") for item in fields(StepTime))
Times = NDArray[np.float64]  # [part, layout]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """Seconds by part and layout of one microbatch."""

    forward: Times
    backward: Times
    recompute: Times  # what backward computes again before it
    weight_seconds: Floats  # of backward, what only makes gradients of weights and can be put off

    def take(self, rows: Any) -> BlockCost:
        """Some of the layouts."""
        return BlockCost(**{item.name: getattr(self, item.name)[..., rows] for item in fields(self)})

    @property
    def forward_seconds(self) -> Floats:
        """Of one microbatch."""
        return np.asarray(self.forward.sum(axis=0))

    @property
    def backward_seconds(self) -> Floats:
        """Of one microbatch, recomputation included."""
        return np.asarray(self.backward.sum(axis=0) + self.recompute.sum(axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPasses:
    """What a block costs whatever backward runs again of it, and what each choice of that adds."""

    forward: Times
    backward: Times
    again: Mapping[Recompute, Times]
    weight_seconds: Floats

    def cost(self, recomputed: Words) -> BlockCost:
        """With nothing, the attention core or every second product, or the whole block run again.

        What runs again does so for both parts of a backward at once: no gradient of a weight can be put off.
        """
        recompute = np.zeros_like(self.forward)
        for word, times in self.again.items():
            recompute = np.where(recomputed == word, times, recompute)
        return BlockCost(
            forward=self.forward,
            backward=self.backward,
            recompute=recompute,
            weight_seconds=np.where(recomputed == "none", self.weight_seconds, 0.0),
        )


def add(times: Times, part: str, seconds: Any) -> None:
    """Add seconds to one part."""
    times[PARTS.index(part)] += seconds
