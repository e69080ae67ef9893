"""Sources of the parts of a step: those of the profile's sections, and the same that the estimate adds up."""

from __future__ import annotations

from typing import Any

import pytest

from planner import api
from planner.spec.estimate import StepTime
from planner.spec.part_sources import part_sources
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from tests.tiny import tiny_spec

WORKLOAD = TrainWorkload(seq_len=128, global_batch=64, precision="bf16")


def test_each_part_but_waiting_has_one() -> None:
    found = part_sources(api.load_hardware("dgx-h100"), WORKLOAD, Strategy())
    assert set(found) == set(StepTime().parts) - {"bubble_seconds", "other_seconds"}


def test_a_link_is_as_sure_as_its_level() -> None:
    profile = api.load_hardware("dgx-h100")
    inner, outer = next(iter(profile.topology.values())), list(profile.topology.values())[-1]
    within = part_sources(profile, WORKLOAD, Strategy(tp=8, dp=2))
    across = part_sources(profile, WORKLOAD, Strategy(tp=16))
    assert within["tp_seconds"] == next(iter(inner.collectives.values())).source
    expected = next(iter(outer.collectives.values())).source if outer.collectives else outer.source
    assert within["dp_seconds"] == across["tp_seconds"] == expected


@pytest.mark.parametrize(
    "strategy", [{}, {"tp": 4, "sp": True}, {"pp": 2, "tp": 2}, {"zero": 3, "recompute": "full"}]
)
def test_they_add_up_to_the_shares_of_the_estimate(strategy: dict[str, Any]) -> None:
    profile, layout = api.load_hardware("dgx-h100"), Strategy.from_dict(strategy, gpus=16)
    found = api.estimate(tiny_spec("llama"), profile, 16, WORKLOAD, layout)
    seconds = dict.fromkeys(("measured", "datasheet", "paper", "assumed"), 0.0)
    for part, source in part_sources(profile, WORKLOAD, layout).items():
        seconds[source] += found.breakdown.parts[part]
    for source, share in seconds.items():
        assert share / sum(seconds.values()) == pytest.approx(getattr(found.uncertainty.sources, source))
