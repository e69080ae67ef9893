"""What would fit: legal, verified, few, and in the promised order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner import api
from planner.cost.estimates import training_estimate
from planner.cost.remedies import remedies
from planner.spec.hardware import HardwareProfile
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.remedy import Remedy
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from planner.units import GIB
from tests.tiny import tiny_spec

MODEL = tiny_spec("llama", layers=8, hidden=256, heads=8, kv_heads=8, ffn=512, vocab=1000, max_positions=2048)
WORKLOAD = TrainWorkload(seq_len=2048, global_batch=64, precision="bf16")


def cluster(memory_gib: float) -> HardwareProfile:
    """Nodes of eight GPUs with so much memory, none of which the driver takes."""
    no_overhead = {"memory.context_gib": 0.0, "memory.communicator_gib": 0.0, "memory.reserved_share": 0.0}
    return api.load_hardware({"base": "dgx-h100", "set": {"device.memory_gib": memory_gib, **no_overhead}})


def told(
    strategy: dict[str, Any], memory_gib: float, gpus: int = 8, model: ModelSpec | None = MODEL
) -> tuple[Remedy, ...]:
    return remedies(
        model, api.trace(MODEL), cluster(memory_gib), WORKLOAD, Strategy.from_dict(strategy, gpus=gpus)
    )


def needed_gib(strategy: dict[str, Any], gpus: int = 8) -> float:
    """The upper end of what a layout takes."""
    layout = Strategy.from_dict(strategy, gpus=gpus)
    found = training_estimate(api.trace(MODEL), cluster(80.0), WORKLOAD, layout)
    return found.uncertainty.memory_bytes.high / GIB


@pytest.fixture(params=[{"microbatch": 4}, {"tp": 2, "microbatch": 2}, {"pp": 2, "zero": 1}, {"dp": 8, "tp": 1}])
def tight(request: pytest.FixtureRequest) -> tuple[dict[str, Any], float]:
    """A layout, and a GPU that has nine tenths of what it needs."""
    return request.param, 0.9 * needed_gib(request.param)


def test_each_is_legal_and_fits(tight: tuple[dict[str, Any], float]) -> None:
    strategy, memory = tight
    found = told(strategy, memory)
    assert 1 <= len(found) <= 5
    for remedy in found:
        assert violations(MODEL, WORKLOAD, remedy.strategy, remedy.gpus) == ()
        full = training_estimate(api.trace(MODEL), cluster(memory), WORKLOAD, remedy.strategy)
        assert full.fits
        assert (full.step_seconds, full.memory_bytes) == (remedy.step_seconds, remedy.memory_bytes)
        assert remedy.memory_high_bytes <= memory * GIB
        assert remedy.flags


def test_few_gpus_come_first_then_short_steps(tight: tuple[dict[str, Any], float]) -> None:
    order = [(remedy.gpus, remedy.step_seconds) for remedy in told(*tight)]
    assert order == sorted(order)
    assert order[0][0] == 8
    assert len({remedy.strategy for remedy in told(*tight)}) == len(order)


def test_a_single_change_is_one_flag() -> None:
    found = told({"microbatch": 4}, 0.95 * needed_gib({"microbatch": 4}))
    flags = [remedy.flags for remedy in found if remedy.gpus == 8]
    assert any(text.split()[0] in ("--microbatch", "--recompute", "--zero") for text in flags)
    assert all(len(text.split()) == 2 or "--dp" in text for text in flags), flags


def test_changes_are_put_together_where_one_is_not_enough() -> None:
    strategy = {"microbatch": 4}
    memory = 1.001 * needed_gib(strategy | {"microbatch": 1, "zero": 3, "recompute": "full"})
    assert all(needed_gib(strategy | change) > memory
               for change in ({"microbatch": 1}, {"zero": 3}, {"recompute": "full"}))  # fmt: skip
    found = told(strategy, memory)
    assert found
    assert len(found[0].flags.split()) >= 4


def test_more_gpus_are_offered_where_these_cannot_hold_it() -> None:
    found = told({"recompute": "full"}, 0.9 * needed_gib({"recompute": "full"}, gpus=1), gpus=1)
    assert found
    assert all(remedy.gpus > 1 and remedy.flags.startswith("--gpus") for remedy in found)
    assert any(remedy.strategy.zero for remedy in found)


def test_nothing_fits_into_nothing() -> None:
    assert told({}, 0.0001) == ()


def test_a_cluster_has_no_more_gpus_than_its_profile() -> None:
    full = 0.9 * needed_gib({"recompute": "full"}, gpus=1)
    profile = cluster(full)
    inner, *_ = profile.topology
    one_node = replace(profile, topology={inner: replace(profile.topology[inner], gpus=2)})
    found = remedies(MODEL, api.trace(MODEL), one_node, WORKLOAD, Strategy(recompute="full"))
    assert {remedy.gpus for remedy in found} == {2}


def test_a_module_without_spec_is_not_cut_further_by_tp() -> None:
    memory = 0.9 * needed_gib({})
    assert all(remedy.strategy.tp == 1 for remedy in told({}, memory, model=None))


def test_open_recomputation_counts_as_full() -> None:
    memory = 0.9 * needed_gib({"recompute": "full"})
    assert all(remedy.strategy.recompute == "full" for remedy in told({"recompute": "auto"}, memory))


def test_copies_stop_mattering_without_shards() -> None:
    """With zero 0 every rank is a copy, however many were stated; sharding then begins from one."""
    assert told({"dp_replicate": 8}, 0.9 * needed_gib({}))
