"""Ranks that a machine has no memory for are not started."""

from __future__ import annotations

import dataclasses

import pytest

from planner.errors import PlannerError
from planner.execute import free_memory
from planner.spec.estimate import Memory
from tests.execute.training import plan_for
from tests.tiny import tiny_spec

GIB = 2.0**30


def test_torch_and_the_training_state_of_all_ranks_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of two stages: a quarter of a GiB each, 7 GiB on the first four and 3 on the others."""
    plan = plan_for(tiny_spec("llama", layers=2), 8, gpus=8, tp=4, pp=2)
    stages = (
        Memory(
            weights_bytes=1 * GIB, gradients_bytes=2 * GIB, optimizer_bytes=4 * GIB, activations_bytes=99 * GIB
        ),
        Memory(weights_bytes=3 * GIB),
    )
    plan = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, memory_per_stage=stages))
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 42.0 * GIB)
    free_memory.require_memory(plan)
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 41.9 * GIB)
    with pytest.raises(
        PlannerError, match=r"8 ranks take at least 2 GiB and 40 GiB, and 41\.9 GiB are free"
    ) as caught:
        free_memory.require_memory(plan)
    assert caught.value.exit_code == 2
