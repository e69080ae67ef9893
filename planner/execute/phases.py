"""What a step is doing now, so that whoever watches its collectives and memory can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

StepPhase = Literal[
    "setup", "forward", "loss", "backward", "recompute", "gradient_sync", "clip", "optimizer", "metadata", "p2p"
]

_now: list[StepPhase] = ["setup"]


def current_phase() -> StepPhase:
    """The innermost phase."""
    return _now[-1]


@contextmanager
def phase(name: StepPhase) -> Iterator[None]:
    """Everything inside belongs to this phase."""
    _now.append(name)
    try:
        yield
    finally:
        _now.pop()
