"""A change after which a layout that is out of memory would fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.spec.codec import Bytes, Seconds, encode
from planner.spec.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A layout that fits, as the flags that lead to it."""

    flags: str  # such as `--recompute full`
    strategy: Strategy
    step_seconds: Seconds
    memory_bytes: Bytes  # as `Estimate.memory_bytes`
    memory_high_bytes: Bytes  # upper end of its interval, which is what fits

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.strategy.gpus

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return {**data, "gpus": self.gpus}
