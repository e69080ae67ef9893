"""Levels from timings that are made up: two hosts of two ranks."""

from __future__ import annotations

import pytest

import planner
from planner.errors import PlannerError
from planner.measure.cases import (
    COLLECTIVES,
    AttentionCase,
    Case,
    CollectiveCase,
    GemmCase,
    PeerCase,
    cases_for,
    key_of,
)
from planner.measure.levels import topology
from planner.measure.profile import Setting, build
from planner.measure.records import Measurement
from planner.measure.topology import Layout
from planner.spec.hardware import Level
from tests.measure.machine import FORMULAS

LAYOUT = Layout(world=4, per_node=2)
ALONE = Level(source="assumed", reference="test", link="none", gpus=2, bandwidth_gb_per_second=1.0, latency_us=1.0)
RATES = {"node": 10e9, "network": 1e9}
FLOORS = {"node": 5e-6, "network": 50e-6}


def _timings(shared: bool) -> dict[Case, Measurement]:
    """Messages of latency and rate; pairs that cross the network at once share it, or not."""
    found: dict[Case, Measurement] = {}
    for case in cases_for(LAYOUT, "cpu", (), quick=False):
        if isinstance(case, (CollectiveCase, PeerCase)):
            many = len(case.groups if isinstance(case, CollectiveCase) else case.pairs)
            slower = many if shared and case.level == "network" else 1
            seconds = FLOORS[case.level] + slower * case.bytes_ / RATES[case.level]
            found[case] = Measurement(seconds=seconds, spread=0.01)
    return found


@pytest.mark.parametrize(("shared", "card_rate"), [(True, 1.0), (False, 2.0)])
def test_latency_rate_and_cards_are_found(shared: bool, card_rate: float) -> None:
    levels, error = topology(LAYOUT, _timings(shared), ALONE, "test")
    node, network = levels["node"], levels["network"]
    assert node.bandwidth_gb_per_second == pytest.approx(10.0, rel=0.01)
    assert network.bandwidth_gb_per_second == pytest.approx(1.0, rel=0.01)
    assert network.latency_us == pytest.approx(50.0, rel=0.05)
    assert (node.gpus, network.gpus, node.nics) == (2, 0, None)
    assert network.nics is not None
    assert (network.nics.count, network.nics.gpus) == (1, 2)
    assert network.nics.bandwidth_gb_per_second == pytest.approx(card_rate, rel=0.01)
    assert set(network.collectives) == set(COLLECTIVES)
    assert {table.ranks for table in network.collectives.values()} == {(2, 4)}
    assert error is not None
    assert error < 2.0
    assert network.collectives["broadcast"].bandwidth_gb_per_second == pytest.approx((1.0, 1.0), rel=0.02)


def test_a_process_alone_takes_what_is_assumed() -> None:
    assert topology(Layout(world=1, per_node=1), {}, ALONE, "test") == ({"peer": ALONE}, None)


def test_a_device_measured_alone_says_what_it_does_not_know() -> None:
    facts = {"cpu": "made up", "cores": 1, "sockets": 1, "threads": 1, "torch": "2", "memory_gib": 4.0}
    setting = Setting(layout=Layout(world=1, per_node=1), device="cpu", dtypes=("fp32",), quick=True, facts=facts)
    measured = {case: Measurement(seconds=_seconds(case), spread=0.01) for case in setting.cases()}
    memory = {"context_gib": 0.5, "communicator_gib": 0.0}
    profile = build(setting, measured, memory, FORMULAS, name="mine", peaks=None, refusals={})
    assert {number.source for number in profile.numbers() if number.key.startswith("topology.")} == {"assumed"}
    assert "link to a second one is assumed" in profile.notes
    assert list(profile.topology) == ["peer"]
    assert planner.collective_seconds(profile, "all_reduce", 1e6, ranks=[0]) == 0.0
    assert planner.collective_seconds(profile, "all_reduce", 1e6, ranks=range(2)) > 0.0
    with pytest.raises(PlannerError, match="describes at most 2 GPUs"):
        planner.collective_seconds(profile, "all_reduce", 1e6, ranks=range(3))


def _seconds(case: Case) -> float:
    """Of a device of 100 GFLOP/s and 10 GB/s."""
    if isinstance(case, GemmCase):
        return 1e-5 + case.flops / 1e11
    if isinstance(case, AttentionCase):
        return 1e-5 + 4.0 * case.batch * case.heads * case.query_len * case.kv_len * case.head_dim / 1e11
    return 1e-5 + getattr(case, "bytes_", 0) / 1e10


def test_every_case_has_a_key_of_its_own() -> None:
    for quick in (True, False):
        for device in ("cpu", "cuda"):
            cases = cases_for(LAYOUT, device, ("bf16", "fp32", "fp8"), quick=quick)
            assert len({key_of(case) for case in cases}) == len(cases)
