"""The name of a GPU in a table of runs → a bundled profile, with what the row says of its cluster.

Names are known or not: a GPU that no line below describes is never taken for another one.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from planner.errors import PlannerError
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import load_hardware
from planner.units import GB, GIB

Changes = dict[str, Any]

_HALF_WIDTH_LINKS = "exported versions have the same chip and memory, with fewer NVLinks"

# spelling of the GPU: profile, keys of it that differ, reference of those.
# Spellings are compared without blanks, dashes and underscores; a size of memory or a form factor may follow.
_SPELLINGS: tuple[tuple[str, str, Changes, str], ...] = (
    (r"H100(SXM5?)?\W*96GB.*500W\W*", "dgx-h100",
     {"device.memory_gib": 95.0, "device.memory_bandwidth_gb_per_second": 2400.0,
      "device.sustained_share": "0.87x"},
     "96 GB HBM2e at 2.4 TB/s, 500 W; 21 runs of Llama 3 on it reach .87 of what the 700 W part sustains"),
    (r"H100(SXM5?)?(80GB)?(HBM3)?", "dgx-h100", {}, ""),
    (r"H800(SXM5?)?(80GB)?", "dgx-h100", {"intra_node_bandwidth": "0.444x"}, _HALF_WIDTH_LINKS),
    (r"H100PCIE(80GB)?", "h100-pcie", {}, ""),
    (r"H200(SXM5?)?(141GB)?", "dgx-h200", {}, ""),
    (r"B200(SXM\d?)?(180GB|192GB)?", "dgx-b200", {}, ""),
    (r"B300(SXM\d?)?(270GB|288GB)?", "dgx-b300", {}, ""),
    (r"GB200(NVL72)?(186GB|192GB)?", "gb200-nvl72", {}, ""),
    (r"GB300(NVL72)?(278GB|288GB)?", "gb300-nvl72", {}, ""),
    (r"A100(SXM4?)?80GB", "dgx-a100-80g", {}, ""),
    (r"A100(SXM4?)?40GB", "dgx-a100-40g", {}, ""),
    (r"A800(SXM4?)?80GB", "dgx-a100-80g", {"intra_node_bandwidth": "0.667x"}, _HALF_WIDTH_LINKS),
    (r"A100PCIE80GB", "a100-pcie", {}, ""),
    (r"V100(SXM2)?32GB", "dgx1-v100", {}, ""),
    (r"V100(SXM2)?16GB", "dgx1-v100", {"device.memory_gib": 15.78}, "capacity that the driver reports"),
    (r"T4(16GB)?", "t4-pcie", {}, ""),
    (r"L40S(48GB)?", "l40s-pcie", {}, ""),
    (r"RTX3090(24GB)?", "rtx3090-pcie", {}, ""),
    (r"RTX4090(24GB)?", "rtx4090-pcie", {}, ""),
    (r"RTXPRO6000(SERVER|BLACKWELL)*(96GB)?", "rtx-pro-6000-pcie", {}, ""),
    (r"MI300X(192GB)?", "mi300x-8", {}, ""),
    (r"TRN1|TRAINIUM", "trn1-32", {}, ""),
)  # fmt: skip

# the same nodes in a cloud whose network the profile on the right describes
_WITH_EFA = {"dgx-h100": "aws-p5", "dgx-a100-40g": "aws-p4d"}
_RACK_GPUS = 64  # a rack of 72 runs jobs of several racks on 16 of its 18 hosts, so that groups stay inside
_SAME = 0.01  # bandwidths closer than this agree
_SAME_MEMORY = 0.12  # nominal sizes, what the driver shows, GB taken for GiB


class UnknownGpuError(Exception):
    """No profile describes this GPU, or its cluster; says why."""


def hardware_of(
    gpu: str,
    *,
    gpus: int,
    memory_gb: float | None = None,
    gpus_per_node: int = 0,
    link: str = "",
    changes: Changes | None = None,
) -> str | dict[str, Any]:
    """A profile's name, or `{base: NAME, set: {…}}` where node or network differ from it.

    `changes` are keys that differ for other reasons. `link` is the connection between nodes as people write it:
    `8x 400 Gb/s per node`, `400 Gb/s per GPU`.
    """
    name, of_gpu = _profile_of(gpu, memory_gb)
    changes = of_gpu | (changes or {})
    name = _WITH_EFA.get(name, name) if "EFA" in link else name
    profile = _loaded(name)
    has_gb = changes.get("device.memory_gib", profile.device.memory_gib) * GIB / GB
    if memory_gb is not None and abs(memory_gb / has_gb - 1.0) > _SAME_MEMORY:
        raise UnknownGpuError(f"no profile for the GPU {gpu} of {memory_gb:g} GB")
    changes |= _node_changes(profile, gpus_per_node)
    changes |= _link_changes(profile, link, gpus_per_node or profile.device.gpus_per_node)
    first, level = next(iter(profile.topology.items()))
    if level.gpus > _RACK_GPUS and gpus > level.gpus and gpus % _RACK_GPUS == 0:
        changes[f"topology.{first}.gpus"] = _RACK_GPUS
    if not changes:
        return name
    hardware = {"base": name, "set": changes}
    _require_sound(json.dumps(hardware, sort_keys=True))
    return hardware


def _profile_of(gpu: str, memory_gb: float | None) -> tuple[str, Changes]:
    plain = re.sub(r"[\s_-]+", "", gpu.upper()).removeprefix("NVIDIA").removeprefix("AMD")
    sized = plain if "GB" in plain or memory_gb is None else f"{plain}{memory_gb:.0f}GB"
    for spelling in (plain, sized):
        for pattern, profile, changes, _ in _SPELLINGS:
            if re.fullmatch(pattern, spelling):
                return profile, dict(changes)
    raise UnknownGpuError(f"no profile for the GPU {gpu or '(none named)'}")


def _node_changes(profile: HardwareProfile, gpus_per_node: int) -> Changes:
    """Smaller or larger nodes: as many network cards a GPU as the profile has, none shared across nodes."""
    usual = profile.device.gpus_per_node
    if not gpus_per_node or gpus_per_node == usual:
        return {}
    changes: Changes = {"device.gpus_per_node": gpus_per_node}
    for name, level in profile.topology.items():
        if level.gpus == usual:
            changes[f"topology.{name}.gpus"] = gpus_per_node
        if level.nics is not None and level.nics.gpus == usual:
            changes[f"topology.{name}.nics.gpus"] = gpus_per_node
            cards = max(1, round(level.nics.count * gpus_per_node / usual))
            changes[f"topology.{name}.nics.count"] = cards
            each = cards * level.nics.bandwidth_gb_per_second / gpus_per_node
            changes[f"topology.{name}.bandwidth_gb_per_second"] = each
    return changes


def _link_changes(profile: HardwareProfile, link: str, gpus_per_node: int) -> Changes:
    """The network as stated, where it is not the profile's."""
    cards, card_gb_per_second = _cards_of(link, gpus_per_node)
    outer = [(name, level) for name, level in profile.topology.items() if level.nics is not None]
    if not cards or not outer:
        return {}
    level = outer[-1][1]
    assert level.nics is not None
    each = cards * card_gb_per_second / gpus_per_node
    if abs(each * level.nics.gpus / (level.nics.count * level.nics.bandwidth_gb_per_second) - 1.0) < _SAME:
        return {}
    if level.collectives:
        return {"inter_node_bandwidth": each}
    shared = math.gcd(cards, gpus_per_node)  # four cards of eight GPUs: each serves two neighbours
    changes: Changes = {}
    for name, _ in outer:
        changes |= {
            f"topology.{name}.nics.count": cards // shared,
            f"topology.{name}.nics.gpus": gpus_per_node // shared,
            f"topology.{name}.nics.bandwidth_gb_per_second": card_gb_per_second,
            f"topology.{name}.bandwidth_gb_per_second": cards // shared * card_gb_per_second,
        }
    return changes


def _cards_of(link: str, gpus_per_node: int) -> tuple[int, float]:
    """Cards of a node and GB/s of one; (0, 0) where the text says nothing, or too much, about it.

    A rate alone, or `per node` without a number of cards, is the whole node's.
    """
    rates = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)\s*(Gb/s|Gbps|GB/s)", link)
    if len(rates) != 1:
        return 0, 0.0
    rate, unit = rates[0]
    gb_per_second = float(rate) / (1.0 if unit == "GB/s" else 8.0)
    if re.search(r"per GPU", link, re.I):
        return gpus_per_node, gb_per_second
    count = re.match(r"\s*(\d{1,4})\s*[x×]", link)
    return (int(count[1]), gb_per_second) if count else (1, gb_per_second)


@functools.cache
def _loaded(name: str) -> HardwareProfile:
    return load_hardware(name)


@functools.cache
def _require_sound(hardware: str) -> None:
    """A cluster that the profile cannot describe is told once, here."""
    try:
        load_hardware(json.loads(hardware))
    except PlannerError as error:
        raise UnknownGpuError(f"the cluster cannot be described: {error.rule} ({error.key})") from None


def described(hardware: str | Mapping[str, Any]) -> str:
    """A profile and its changes on one line."""
    if isinstance(hardware, str):
        return hardware
    changes = ", ".join(f"{key} {value}" for key, value in hardware.get("set", {}).items())
    return f"{hardware['base']} ({changes})"
