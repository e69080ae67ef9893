"""Two hosts joined by a slow link: the profile sees it for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.spec.hardware_sources import load_hardware
from tests.hosts import Hosts, ended

MEGABITS = 400
RATE_GB_PER_SECOND = MEGABITS / 8e3


@pytest.mark.slow
@pytest.mark.parametrize("slow_hosts", [MEGABITS], indirect=True)
def test_a_slow_network_is_seen_beside_a_fast_node(slow_hosts: Hosts, tmp_path: Path) -> None:
    output = tmp_path / "two.yaml"
    words = ("-m", "tests.measure.machine", str(output), "--dtype", "fp32")
    said = ended([host.torchrun(2, *words) for host in slow_hosts], 240)
    assert [code for code, *_ in said] == [0, 0], said
    profile = load_hardware(output)
    assert list(profile.topology) == ["node", "network"]
    node, network = profile.topology.values()
    assert (node.gpus, network.gpus, profile.device.gpus_per_node) == (2, 0, 2)
    assert network.bandwidth_gb_per_second == pytest.approx(RATE_GB_PER_SECOND, rel=0.25)
    assert network.nics is not None
    assert (network.nics.count, network.nics.gpus) == (1, 2)
    assert network.nics.bandwidth_gb_per_second == pytest.approx(RATE_GB_PER_SECOND, rel=0.25)
    assert node.bandwidth_gb_per_second > 4 * network.bandwidth_gb_per_second
    assert set(network.collectives["all_reduce"].ranks) == {2, 4}
    broadcast = network.collectives["broadcast"].bandwidth_gb_per_second[0]  # of one rank on each host
    assert broadcast == pytest.approx(RATE_GB_PER_SECOND, rel=0.6)  # twice the rate would be a fault
    assert "nodes: 2" in profile.environment["ranks"]
