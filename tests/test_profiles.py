"""The bundled hardware profiles: complete, sourced, plausible."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, replace
from typing import Any

import pytest

import planner
from planner.spec.files import bundled_names

NAMES = [
    "dgx1-v100",
    "dgx-a100-40g",
    "dgx-a100-80g",
    "a100-pcie",
    "dgx-h100",
    "h100-pcie",
    "dgx-h200",
    "dgx-b200",
    "dgx-b300",
    "gb200-nvl72",
    "gb300-nvl72",
    "l40s-pcie",
    "rtx-pro-6000-pcie",
    "rtx4090-pcie",
    "rtx3090-pcie",
    "t4-pcie",
    "mi300x-8",
    "aws-p4d",
    "aws-p5",
    "trn1-32",
]
WITHOUT_KERNELS = (
    "dgx1-v100",
    "a100-pcie",
    "h100-pcie",
    "rtx4090-pcie",
    "rtx3090-pcie",
    "t4-pcie",
    "mi300x-8",
    "trn1-32",
)
WITHOUT_SWITCH = ("dgx1-v100", "mi300x-8")  # a link to each peer: collectives fill several at once

CLUSTERS = {  # GPUs behind one set of leaf switches, or in a scalable unit
    "dgx1-v100": 144,
    "dgx-a100-40g": 160,
    "dgx-a100-80g": 160,
    "dgx-h100": 256,
    "dgx-h200": 256,
    "dgx-b200": 256,
    "dgx-b300": 576,
    "gb200-nvl72": 576,
    "gb300-nvl72": 576,
    "mi300x-8": 256,
    "aws-p4d": 256,
    "aws-p5": 256,
    "trn1-32": 1024,
}

ABOUT = ("source", "reference", "spread", "other_sources")
FACTORS = ("flops_factor", "bytes_factor")
PHASES = ("prefill", "backward", "decode", "wide_decode")
MEASURED_ON = {"A100 SXM": "dgx-a100-80g", "H100 SXM": "dgx-h100", "L40S": "l40s-pcie"}

every_profile = pytest.mark.parametrize("name", NAMES)
every_cluster = pytest.mark.parametrize(("name", "unit"), CLUSTERS.items())


def test_all_are_there() -> None:
    assert set(NAMES) <= set(bundled_names("hardware_profiles"))


@every_profile
def test_every_number_has_a_source(name: str) -> None:
    numbers = planner.load_hardware(name).numbers()
    assert len(numbers) > 60
    for number in numbers:
        assert number.source in ("measured", "datasheet", "paper", "assumed")
        assert len(number.reference) > 8, number.key


@every_profile
def test_bandwidths_nest(name: str) -> None:
    profile = planner.load_hardware(name)
    levels = list(profile.topology.values())
    for inner, outer in itertools.pairwise(levels):
        assert outer.bandwidth_gb_per_second <= inner.bandwidth_gb_per_second
        assert outer.latency_us >= inner.latency_us
    assert levels[0].bandwidth_gb_per_second < profile.device.memory_bandwidth_gb_per_second
    for level in levels:
        links = level.gpus - 1 if name in WITHOUT_SWITCH else 1.3
        for table in level.collectives.values():
            assert max(table.bandwidth_gb_per_second) <= links * level.bandwidth_gb_per_second


@every_profile
def test_any_number_of_nodes(name: str) -> None:
    profile = planner.load_hardware(name)
    profile.require_gpus(100_000)
    node = profile.device.gpus_per_node
    across = planner.collective_seconds(name, "all_reduce", 1e8, ranks=range(0, 64 * node, node))
    inside = planner.collective_seconds(name, "all_reduce", 1e8, ranks=range(2))
    assert across > inside > 0


@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_kernels_that_nobody_measured_say_so(name: str) -> None:
    profile = planner.load_hardware(name)
    kernels = [number for number in profile.numbers() if number.key.startswith(("gemm.", "attention."))]
    assert kernels
    assert {number.source for number in kernels} == {"assumed"}


@every_profile
def test_precisions_are_those_of_the_device(name: str) -> None:
    profile = planner.load_hardware(name)
    for precision in profile.gemm:
        assert profile.device.peak_flops(precision) > 0
    seconds = planner.gemm_seconds(name, 4096, 4096, 4096, dtype="fp16")
    assert seconds > 2 * 4096**3 / profile.device.peak_flops("fp16")


def numbers_of(curve: Any, times: float = 1.0) -> dict[str, Any]:
    """The numbers of a curve, its efficiency so many times as large, to four digits."""
    found = {key: value for key, value in asdict(curve).items() if key not in ABOUT}
    return found | {"efficiency": float(f"{found['efficiency'] * times:.4g}")}


@every_profile
def test_curves_of_another_precision_are_copies(name: str) -> None:
    profile = planner.load_hardware(name)
    for table in (profile.gemm, profile.attention):
        for curves in table.values():
            for phase in PHASES if table is profile.attention else ("",):
                curve = getattr(curves, phase) if phase else curves
                copied = re.search(r"as in (\w+)$", curve.reference if curve else "")
                if copied:
                    original = table[copied[1]]
                    assert numbers_of(curve) == numbers_of(getattr(original, phase) if phase else original)


@every_profile
def test_a_backward_pass_is_derived_from_its_forward_kernel(name: str) -> None:
    for fused in planner.load_hardware(name).attention.values():
        own = {key: getattr(fused.backward, key) for key in (*ABOUT, "efficiency", "floor_us", *FACTORS)}
        assert replace(fused.prefill, **own) == fused.backward
        assert fused.backward.efficiency == pytest.approx(0.575 * fused.prefill.efficiency, rel=1e-3)
        assert fused.backward.floor_us == pytest.approx(2 * fused.prefill.floor_us, rel=1e-3)


@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_curves_of_another_gpu_are_copies(name: str) -> None:
    profile = planner.load_hardware(name)
    found = 0
    for precision, fused in profile.attention.items():
        gpu = re.search(r"measured on (A100 SXM|H100 SXM|L40S)", fused.prefill.reference)
        if gpu is None:
            continue
        found += 1
        attention = planner.load_hardware(MEASURED_ON[gpu[1]]).attention
        original = attention["bf16" if "in 16 bits" in fused.prefill.reference else precision]
        lowered = 0.75 if "lowered by a quarter" in fused.prefill.reference else 1.0
        for phase in ("prefill", "backward", "decode"):
            assert numbers_of(getattr(fused, phase)) == numbers_of(getattr(original, phase), lowered)
    assert found


def test_a_slower_link_shows() -> None:
    slowed = {"base": "dgx-h100", "set": {"inter_node_bandwidth": "0.25x"}}
    ranks = range(0, 64, 8)
    before = planner.collective_seconds("dgx-h100", "all_gather", 1e9, ranks=ranks)
    assert planner.collective_seconds(slowed, "all_gather", 1e9, ranks=ranks) > 3 * before


# Clusters: units behind leaf switches, and a spine that joins them


def without_spine(name: str) -> dict[str, Any]:
    """The profile as if all nodes stood behind one set of leaf switches."""
    data = planner.load_hardware(name).to_dict()
    *inner, (last, unit), _ = data["topology"].items()
    unit = {key: value for key, value in unit.items() if key != "gpus"}
    unit["other_sources"] = {key: value for key, value in unit["other_sources"].items() if key != "gpus"}
    return {**data, "topology": {**dict(inner), last: unit}}


def test_all_clusters_have_a_spine() -> None:
    with_cards = {
        name: [level for level in planner.load_hardware(name).topology.values() if level.nics] for name in NAMES
    }
    assert {name for name, levels in with_cards.items() if len(levels) > 1} == set(CLUSTERS)


@every_cluster
def test_units_and_a_spine(name: str, unit: int) -> None:
    *_, inner, spine = planner.load_hardware(name).topology.values()
    assert (inner.gpus, spine.gpus) == (unit, 0)
    assert spine.latency_us > inner.latency_us
    assert spine.bandwidth == inner.bandwidth
    assert spine.nics is not None
    assert inner.nics is not None
    assert (spine.nics.count, spine.nics.gpus) == (inner.nics.count, inner.nics.gpus)


@every_cluster
def test_inside_a_unit_the_spine_changes_nothing(name: str, unit: int) -> None:
    flat, node = without_spine(name), planner.load_hardware(name).device.gpus_per_node
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        for ranks in (range(unit), range(0, unit, node), range(node)):
            for size in (1e4, 1e8):
                found = planner.collective_seconds(name, kind, size, ranks=ranks)
                assert found == planner.collective_seconds(flat, kind, size, ranks=ranks)


@every_cluster
def test_crossing_the_spine_takes_longer(name: str, unit: int) -> None:
    node = planner.load_hardware(name).device.gpus_per_node
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        ranks = range(0, unit, node)
        across = range(unit // 2 // node * node, unit // 2 // node * node + unit, node)
        inside, outside = (planner.collective_seconds(name, kind, 1e4, ranks=group) for group in (ranks, across))
        assert outside > inside
    near, far = (planner.collective_seconds(name, "p2p", 1e6, ranks=(0, to)) for to in (unit - node, unit))
    assert far > near


@every_cluster
def test_an_oversubscribed_spine_bites(name: str, unit: int) -> None:
    """All GPUs of a unit send to the next one at once: four to one makes it as much slower."""
    crowded = {"base": name, "set": {"topology.spine.oversubscription": 4}}

    def times_slower(kind: str, ranks: Any, concurrent_groups: int) -> float:
        both = [
            planner.collective_seconds(where, kind, 1e10, ranks=ranks, concurrent_groups=concurrent_groups)
            for where in (crowded, name)
        ]
        return both[0] / both[1]

    assert times_slower("p2p", (0, unit), unit) == pytest.approx(4, rel=0.03)
    assert times_slower("all_reduce", range(0, 4 * unit, unit), unit) == pytest.approx(4, rel=0.03)
    assert times_slower("all_to_all", range(8 * unit), 1) > 3  # seven of eight bytes cross
    assert times_slower("p2p", (0, unit), 1) == 1.0
    assert times_slower("all_reduce", range(unit), 1) == 1.0


@every_cluster
def test_a_hundred_thousand_gpus(name: str, unit: int) -> None:
    node = planner.load_hardware(name).device.gpus_per_node
    gpus = 100_000 // node * node
    several, whole = (
        planner.collective_seconds(name, "all_reduce", 1e9, ranks=range(count)) for count in (4 * unit, gpus)
    )
    assert several < whole < 2 * several


@every_cluster
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
def test_further_nodes_never_make_it_cheaper(name: str, unit: int, kind: str) -> None:
    node = planner.load_hardware(name).device.gpus_per_node
    for size in (1e3, 1e6, 16e6, 134e6, 1e9, 1e10):
        steps = [planner.collective_seconds(name, kind, size, ranks=range(node * count)) for count in (1, 2, 4, 8)]
        assert steps == sorted(steps), size
