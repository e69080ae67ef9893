"""Names of GPUs: each known spelling has its profile, and no other name has any."""

from __future__ import annotations

from typing import Any

import pytest

from planner.spec.hardware_sources import load_hardware
from planner.spec.runs_hardware import UnknownGpuError, described, hardware_of


@pytest.mark.parametrize(
    ("gpu", "memory", "profile"),
    [
        ("H100-SXM", 80.0, "dgx-h100"),
        ("NVIDIA H100 SXM5 80GB", None, "dgx-h100"),
        ("H100 PCIe", None, "h100-pcie"),
        ("H200", 141.0, "dgx-h200"),
        ("GB200", 186.0, "gb200-nvl72"),
        ("GB300", 278.0, "gb300-nvl72"),
        ("B200", 180.0, "dgx-b200"),
        ("B300", 270.0, "dgx-b300"),
        ("A100-SXM-80GB", 80.0, "dgx-a100-80g"),
        ("A100", 40.0, "dgx-a100-40g"),
        ("A100-SXM4-40GB", None, "dgx-a100-40g"),
        ("A100", 80.0, "dgx-a100-80g"),
        ("V100-SXM2-32GB", 32.0, "dgx1-v100"),
        ("T4", 16.0, "t4-pcie"),
        ("MI300X", 192.0, "mi300x-8"),
    ],
)
def test_spellings(gpu: str, memory: float | None, profile: str) -> None:
    assert hardware_of(gpu, gpus=8, memory_gb=memory) == profile


@pytest.mark.parametrize(
    ("gpu", "memory"),
    [
        ("", None),
        ("A100", None),
        ("H20", 96.0),
        ("H100-SXM", 64.0),
        ("B200 (power limited)", 180.0),
        ("GB2000", None),
        ("V100-SXM2-16GB x12 + T4 x4 (heterogeneous)", 16.0),
        ("(Blackwell, 184 GiB; not named)", 184.0),
    ],
)
def test_any_other_name_is_refused(gpu: str, memory: float | None) -> None:
    with pytest.raises(UnknownGpuError, match="no profile for the GPU"):
        hardware_of(gpu, gpus=8, memory_gb=memory)


def test_a_part_of_less_power_and_more_memory() -> None:
    found = hardware_of("H100-SXM (96GB HBM2e 2.4TB/s, 500W)", gpus=8, memory_gb=96.0)
    device, usual = load_hardware(found).device, load_hardware("dgx-h100").device
    assert (device.memory_gib, device.memory_bandwidth_gb_per_second) == (95.0, 2400.0)
    assert device.sustained_share == pytest.approx(0.87 * usual.sustained_share)


@pytest.mark.parametrize(
    ("gpu", "node", "link", "gb_per_second", "cards", "served"),
    [  # the rate of one GPU while its neighbours leave their shared card alone
        ("A100-SXM-80GB", 8, "4x Omni-Path 100 Gb/s per node (Jean Zay)", 12.5, 1, 2),
        ("A100-SXM-80GB", 8, "8x 100 Gb/s per node", 12.5, 1, 1),
        ("H100-SXM", 8, "200 Gb/s per GPU", 25.0, 1, 1),
        ("T4", 4, "50 Gb/s (as set in a script)", 6.25, 1, 4),
        ("A100-SXM-80GB", 4, "", 25.0, 1, 1),
    ],
)
def test_the_network_is_what_the_row_says(
    gpu: str, node: int, link: str, gb_per_second: float, cards: int, served: int
) -> None:
    profile = load_hardware(hardware_of(gpu, gpus=64, gpus_per_node=node, link=link))
    outer = list(profile.topology.values())[-1]
    assert outer.nics is not None
    assert profile.device.gpus_per_node == node
    assert outer.bandwidth_gb_per_second == pytest.approx(gb_per_second)
    assert (outer.nics.count, outer.nics.gpus) == (cards, served)


@pytest.mark.parametrize("link", ["8x 400 Gb/s NDR IB per node", "400 Gb/s per GPU RDMA", "50 GB/s per GPU", ""])
def test_a_network_that_agrees_changes_nothing(link: str) -> None:
    assert hardware_of("H100-SXM", gpus=64, gpus_per_node=8, link=link) == "dgx-h100"


def test_efa_has_profiles_of_its_own() -> None:
    assert hardware_of("H100-SXM", gpus=32, gpus_per_node=8, link="EFA 3200 Gb/s per node") == "aws-p5"


def test_jobs_of_several_racks_take_64_gpus_of_each() -> None:
    several = hardware_of("GB200", gpus=256, gpus_per_node=4)
    assert several == {"base": "gb200-nvl72", "set": {"topology.nvlink.gpus": 64}}
    assert load_hardware(several).topology["nvlink"].gpus == 64
    assert hardware_of("GB200", gpus=64, gpus_per_node=4) == "gb200-nvl72"
    assert described(several) == "gb200-nvl72 (topology.nvlink.gpus 64)"


def test_a_node_that_the_profile_cannot_take_is_told() -> None:
    with pytest.raises(UnknownGpuError, match="the cluster cannot be described"):
        hardware_of("V100-SXM2-32GB", gpus=16, gpus_per_node=4)


def test_every_spelling_leads_to_a_profile_that_loads() -> None:
    from planner.spec import runs_hardware

    for _, profile, changes, reference in runs_hardware._SPELLINGS:
        data: Any = {"base": profile, "set": changes} if changes else profile
        assert load_hardware(data).name == profile
        assert bool(changes) == bool(reference), "a changed number says why"
