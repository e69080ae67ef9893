"""Published measurements of kernels, which lie beside a checkout, and the rules by which rows are left out.

A rule that holds for `kept` says that a row is known to be bad. One that holds for `fitted` alone says that
the row is sound but shows something that the formula leaves out, so that no constant should follow it.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from planner.cost.collectives import CollectiveKind, collective_seconds
from planner.spec.hardware import Device, HardwareProfile
from planner.spec.hardware_sources import load_hardware
from planner.spec.workload import KvPrecision, Precision
from planner.units import MIB

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# profile: system in the measurements
SYSTEMS: dict[str, str] = {
    "dgx-a100-80g": "a100_sxm",
    "dgx-h100": "h100_sxm",
    "dgx-h200": "h200_sxm",
    "dgx-b200": "b200_sxm",
    "dgx-b300": "b300_sxm",
    "gb200-nvl72": "gb200",
    "gb300-nvl72": "gb300",
    "l40s-pcie": "l40s",
    "rtx-pro-6000-pcie": "rtx_pro_6000_server",
}
GEMM_DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4"}
KV_DTYPES: dict[KvPrecision, str] = {"bf16": "bfloat16", "fp8": "fp8"}
PHASES = {"prefill": "context", "decode": "generation"}
COLLECTIVES: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


class MissingDataError(Exception):
    """The measurements do not lie where they were looked for."""


@functools.cache
def table(name: str, folder: Path = DATA) -> list[dict[str, str]]:
    """The rows of a file."""
    path = folder / name
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; the published measurements do not lie there")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def profile(name: str) -> HardwareProfile:
    """A shipped profile."""
    return load_hardware(name)


def columns(rows: list[dict[str, str]], *names: str) -> Floats:
    """Columns of numbers, one below the other."""
    return np.array([[float(row[name]) for name in names] for row in rows]).reshape(-1, len(names)).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Timings of one kernel on one system."""

    sizes: Mapping[str, Floats]
    seconds: Floats
    kept: Mask
    fitted: Mask
    kernel: npt.NDArray[np.str_]
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason: rows not kept

    def where(self, mask: Mask) -> dict[str, Floats]:
        """Sizes of some of the rows."""
        return {key: value[mask] for key, value in self.sizes.items()}


# Matrix products

# GB200's clocks fell during long products (half of B200's rate from here on); such rows are known to be bad
GB200_LONGEST_FLOPS: dict[Precision, float] = {"bf16": 1e12, "fp8": 1e13, "fp8_block": 1e13, "nvfp4": 1e13}
SLOW_CLOCKS = "long products, during which clocks fell"
HOST_BOUND = "not replayed from a graph: less than twice the host's time for small products"

# GPUs whose last-level cache keeps operands between the replays of a graph, and what it holds
CACHE_BYTES = {"l40s": 96 * MIB, "rtx_pro_6000_server": 128 * MIB}


def gemm_rows(name: str, precision: Precision, folder: Path = DATA) -> Rows:
    """Matrix products of a profile's system."""
    system = SYSTEMS[name]
    rows = [
        row
        for row in table("gemm.csv", folder)
        if row["system"] == system and row["dtype"] == GEMM_DTYPES[precision]
    ]
    m, n, k, microseconds = columns(rows, "m", "n", "k", "latency_us")
    flops = 2.0 * m * n * k
    slow = (system == "gb200") & (flops >= GB200_LONGEST_FLOPS[precision])
    host = np.full(len(m), False)
    if precision == "fp8_block" and len(m):
        host = microseconds <= 2.0 * np.percentile(microseconds[flops < 1e9], 95)
    kept = ~slow & ~host
    device = profile(name).device
    cached = system in CACHE_BYTES and _cached(
        device, precision, m, n, k, microseconds * 1e-6, CACHE_BYTES[system]
    )
    return Rows(
        sizes={"m": m, "n": n, "k": k},
        seconds=microseconds * 1e-6,
        kept=kept,
        fitted=kept & ~np.asarray(cached),
        kernel=np.array([row["kernel"] for row in rows]),
        left_out=_counted({SLOW_CLOCKS: slow, HOST_BOUND: host & ~slow}),
    )


def _cached(
    device: Device, precision: Precision, m: Floats, n: Floats, k: Floats, seconds: Floats, cache: float
) -> Mask:
    """Products whose operands surely or probably came from the cache.

    Faster than memory allows; or small beside the cache and near that limit.
    """
    width = {"bf16": 2.0, "nvfp4": 0.5 + 1 / 16, "fp8_block": 1.0 + 4 / 128}.get(precision, 1.0)
    weight = 1.0 if precision == "fp8_block" else width
    moved = width * m * k + weight * n * k + 2.0 * m * n
    least = moved / device.memory_bandwidth
    mask: Mask = ((moved <= cache / 6) & (least > 0.4 * seconds)) | (least >= seconds)
    return mask


# Attention

TRITON = "Triton fallbacks"
DECODE_KERNEL = "prefill of one query, which a decoding kernel serves"
NOT_SPLIT = "ungrouped heads, whose cache FlashAttention 2 does not split"


def attention_rows(name: str, phase: str, precision: KvPrecision, folder: Path = DATA) -> Rows:
    """Fused attention of a profile's system; kept are the rows of the kernels that usually serve it."""
    rows = [
        row
        for row in table("attention.csv", folder)
        if row["system"] == SYSTEMS[name]
        and row["phase"] == PHASES[phase]
        and row["kv_cache_dtype"] == KV_DTYPES[precision]
    ]
    keys = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "latency_us")
    batch, query_len, step, heads, kv_heads, head_dim, microseconds = columns(rows, *keys)
    reasons = np.array([_unusual(row) for row in rows], dtype=np.str_)
    kept = reasons == ""
    return Rows(
        sizes={
            "batch": batch, "query_len": query_len, "kv_len": query_len + step,
            "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        },
        seconds=microseconds * 1e-6,
        kept=kept,
        fitted=kept,
        kernel=np.array([row["kernel_source"] for row in rows], dtype=np.str_),
        left_out=_counted({reason: reasons == reason for reason in (TRITON, DECODE_KERNEL, NOT_SPLIT)}),
    )  # fmt: skip


def _unusual(row: Mapping[str, str]) -> str:
    """Why a row shows another kernel than the fitted one, or nothing."""
    if "triton" in row["kernel_source"]:
        return TRITON
    if row["phase"] == "context":
        return DECODE_KERNEL if row["isl"] == "1" or "decode" in row["kernel_source"] else ""
    ungrouped = row["num_heads"] == row["num_key_value_heads"]
    return NOT_SPLIT if ungrouped and row["kernel_source"] == "vllm_flash_attn_fa2" else ""


# Collectives

BAD_GROUP = ("l40s", "8")
BAD_GROUP_REASON = "groups of 8 L40S, known to be bad"
ELEMENTS = {"half": "fp16", "int8": "int8"}


def nccl_rows(name: str, kind: CollectiveKind, folder: Path = DATA) -> Rows:
    """NCCL inside a node of a profile's system; `sizes` hold ranks, bytes, and 1 where elements have 8 bits."""
    rows = [
        row
        for row in table("nccl.csv", folder)
        if (row["system"], row["collective"]) == (SYSTEMS[name], kind) and row["dtype"] in ELEMENTS
    ]
    bad = np.array([(row["system"], row["gpus"]) == BAD_GROUP for row in rows])
    ranks, count, microseconds = columns(rows, "gpus", "bytes", "latency_us")
    return Rows(
        sizes={"ranks": ranks, "bytes": count, "int8": np.array([float(row["dtype"] == "int8") for row in rows])},
        seconds=microseconds * 1e-6,
        kept=~bad,
        fitted=~bad,
        kernel=np.array([row["lib_version"] for row in rows]),
        left_out=_counted({BAD_GROUP_REASON: bad}),
    )


MESH = "dgx1-v100"  # whose collectives were timed in a hybrid cube mesh, by the bandwidths that they reach
MESH_SIZES = (2, 3, 4, 5, 6, 7, 8)
_MESH_SYSTEM = "v100 server (not described further)"


def mesh_rows(sizes: Collection[int], folder: Path = DATA) -> Rows:
    """All-reduces of fp32 among so many V100 of a hybrid cube mesh, from 1 MiB on."""
    rows = [
        row
        for row in table("collectives_published.csv", folder)
        if row["system"] == _MESH_SYSTEM and float(row["gpus"]) in sizes
    ]
    ranks, count, microseconds = columns(rows, "gpus", "bytes", "time_us")
    kept = np.full(len(rows), True)
    return Rows(
        sizes={"ranks": ranks, "bytes": count, "int8": np.zeros(len(rows))},
        seconds=microseconds * 1e-6,
        kept=kept,
        fitted=kept,
        kernel=np.array([row["library"] for row in rows]),
    )


def twins_apart(rows: Rows) -> float:
    """By how much half and int8 of equal bytes differ, on average: noise, where elements are not added up."""
    kept, one_byte = rows.where(rows.kept), rows.sizes["int8"][rows.kept] > 0
    sizes, seconds = list(zip(kept["ranks"], kept["bytes"], strict=True)), rows.seconds[rows.kept]
    half = {size: time for size, time, one in zip(sizes, seconds, one_byte, strict=True) if not one}
    pairs = zip(sizes, seconds, one_byte, strict=True)
    apart = [abs(time / half[size] - 1.0) for size, time, one in pairs if one and size in half]
    return float(np.mean(apart)) if apart else float("nan")


ENGINE_MODES: tuple[Literal["graph", "eager"], ...] = ("graph", "eager")
_WORTH_IT = 0.95  # of NCCL's time: an engine's own all-reduce is of use while it takes less


def custom_all_reduce_rows(name: str, mode: str, folder: Path = DATA) -> tuple[Rows, float]:
    """The newest vLLM's own all-reduce up to the largest message at which it beats NCCL, and that size in bytes.

    The size is that of its CUDA graph, averaged over group sizes.
    """
    system, releases = SYSTEMS[name], _releases(name, folder)
    rows = releases[max(releases)] if releases else []
    nccl = {
        (row["gpus"], row["bytes"]): float(row["latency_us"])
        for row in table("nccl.csv", folder)
        if (row["system"], row["collective"], row["dtype"]) == (system, "all_reduce", "half")
    }
    shares: dict[int, list[float]] = {}
    for row in rows:
        size = (row["gpus"], row["bytes"])
        if row["impl"] == "graph" and size in nccl:
            shares.setdefault(int(row["bytes"]), []).append(float(row["latency_us"]) / nccl[size])
    largest = 0
    for count in sorted(shares):
        if np.mean(shares[count]) < _WORTH_IT:
            largest = count
        elif count > 2**16:
            break
    rows = [row for row in rows if row["impl"] == mode]
    ranks, bytes_, microseconds = columns(rows, "gpus", "bytes", "latency_us")
    kept = bytes_ <= largest
    found = Rows(
        sizes={"ranks": ranks, "bytes": bytes_, "int8": np.zeros(len(rows))},
        seconds=microseconds * 1e-6,
        kept=kept,
        fitted=kept,
        kernel=np.array([row["framework_version"] for row in rows]),
        left_out=_counted({"messages that NCCL carries faster": ~kept}),
    )
    return found, float(largest)


def custom_predicted(name: str, rows: Rows, mode: Literal["graph", "eager"] | None) -> Floats:
    """Seconds of the rows kept, by the engine's own all-reduce or without it."""
    sizes = rows.where(rows.kept)
    predicted = np.empty(len(sizes["bytes"]))
    for size in np.unique(sizes["ranks"]):
        here = sizes["ranks"] == size
        predicted[here] = collective_seconds(
            profile(name), "all_reduce", sizes["bytes"][here], ranks=range(int(size)), custom_all_reduce=mode
        )
    return predicted


def releases_apart(name: str, mode: str, folder: Path = DATA) -> float:
    """By how much the two newest releases of vLLM differ on average, over the messages that are kept."""
    newest, largest = custom_all_reduce_rows(name, mode, folder)
    releases = _releases(name, folder)
    if len(releases) < 2 or not newest.kept.any():
        return float("nan")
    before = {
        (float(row["gpus"]), float(row["bytes"])): float(row["latency_us"]) * 1e-6
        for row in releases[sorted(releases)[-2]]
        if row["impl"] == mode and float(row["bytes"]) <= largest
    }
    sizes = newest.where(newest.kept)
    pairs = zip(sizes["ranks"], sizes["bytes"], newest.seconds[newest.kept], strict=True)
    apart = [
        abs(before[ranks, count] / seconds - 1.0) for ranks, count, seconds in pairs if (ranks, count) in before
    ]
    return float(np.mean(apart)) if apart else float("nan")


def _releases(name: str, folder: Path) -> dict[tuple[int, ...], list[dict[str, str]]]:
    """A system's rows of vLLM by release, those known to be bad left out."""
    found: dict[tuple[int, ...], list[dict[str, str]]] = {}
    for row in table("custom_allreduce.csv", folder):
        own = row["system"] == SYSTEMS[name] and row["framework_version"].startswith("vllm/")
        if own and (row["system"], row["gpus"]) != BAD_GROUP:
            found.setdefault(_version(row), []).append(row)
    return found


def _version(row: Mapping[str, str]) -> tuple[int, ...]:
    return tuple(int(part) for part in row["framework_version"].split("/")[1].split("."))


# published system: profile, and what of its outermost level differs there
ACROSS_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "2x p4de.24xlarge": ("aws-p4d", {}),
    "2x p5.48xlarge": ("aws-p5", {}),
    "2x p5.48xlarge (EKS)": ("aws-p5", {}),
    # EFA v3 and v4: fitted on these rows
    "16x p5en.48xlarge": ("dgx-h200", {"latency_us": 40.0, "power": 0.8, "nics": (16, 25.0)}),
    "AWS p5en.48xlarge x4": ("dgx-h200", {"latency_us": 40.0, "power": 0.8, "nics": (16, 25.0)}),
    "AWS P6-B200": ("dgx-b200", {"latency_us": 90.0, "power": 0.8, "nics": (8, 50.0)}),
    # link and GPU are not stated; the ring's bandwidth is that of eight 100 Gb/s cards
    "4 nodes (from the plot title), GPU not named": (
        "dgx-a100-80g", {"latency_us": 15.0, "power": 1.0, "nics": (8, 12.5)},
    ),
}  # fmt: skip


def across_nodes_rows(system: str, folder: Path = DATA) -> tuple[Floats, Floats, Floats]:
    """Nodes, bytes and seconds of the all-reduces of fp32 published for a system of 8 GPUs a node."""
    rows = [
        row
        for row in table("collectives_published.csv", folder)
        if row["system"] == system and row["nodes"] not in ("", "1") and row["time_us"]
    ]
    nodes, count, microseconds = columns(rows, "nodes", "bytes", "time_us")
    return nodes, count, microseconds * 1e-6


def across_nodes_profile(system: str) -> HardwareProfile:
    """The shipped profile whose nodes a published system has, with that system's network."""
    name, changes = ACROSS_NODES[system]
    found = profile(name)
    if not changes:
        return found
    count, bandwidth = changes["nics"]
    source = {"source": "assumed", "reference": "the rows themselves"}
    nics = {**source, "count": count, "gpus": 8, "bandwidth_gb_per_second": bandwidth, "efficiency": 0.95}
    net = {**source, "link": "as published", "bandwidth_gb_per_second": count * bandwidth / 8, "nics": nics}
    net |= {key: changes[key] for key in ("latency_us", "power")}
    node = next(iter(found.to_dict()["topology"].items()))
    return HardwareProfile.from_dict({**found.to_dict(), "topology": dict([node, ("net", net)])})


def _counted(reasons: Mapping[str, Any]) -> dict[str, int]:
    return {reason: int(np.sum(mask)) for reason, mask in reasons.items() if np.sum(mask)}
